"""Acceptance rules: which drafts are kept, and which token follows them.

To add a rule: one file with a `Rule`, one line in `RULES`.
"""

from emssd_compile.acceptance.greedy import GreedyMatch
from emssd_compile.errors import OptionError
from emssd_compile.step.acceptance import Rule, Verdict, Verification

RULES: dict[str, type[Rule]] = {"greedy": GreedyMatch}

__all__ = ["RULES", "GreedyMatch", "Rule", "Verdict", "Verification", "make_rule"]


def make_rule(choice: str | Rule) -> Rule:
    """A rule by name, or the rule given; `"auto"` is the best lossless rule for greedy decoding."""
    if isinstance(choice, Rule):
        return choice
    if choice == "auto":
        return GreedyMatch()
    if choice not in RULES:
        raise OptionError(f"unknown acceptance rule {choice!r}; choose one of {['auto', *RULES]} or pass a Rule")
    return RULES[choice]()
