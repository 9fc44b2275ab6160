"""Acceptance rules: which drafts are kept, and which token follows them.

To add a rule: one file with a `Rule`, one line in `RULES`. A lossy rule is taken by its name only.
"""

from collections.abc import Callable

from emssd_compile.acceptance.greedy import GreedyMatch
from emssd_compile.acceptance.match import Match
from emssd_compile.errors import OptionError, RuleError
from emssd_compile.step.acceptance import Rule, Verdict, Verification, check_rule

RULES: dict[str, Callable[[], Rule]] = {"match": Match, "greedy": GreedyMatch}

__all__ = ["RULES", "GreedyMatch", "Match", "Rule", "Verdict", "Verification", "make_rule"]


def make_rule(choice: str | Rule) -> Rule:
    """A rule by name, or the lossless rule given; `"auto"` gives the tokens of decoding without drafts.

    Raises:
        OptionError: there is none of that name, a class is given, or an object that is lossy.
        RuleError: the rule does not say whether it is lossless, or has no `forward`.
    """
    if isinstance(choice, type):
        raise OptionError(f"acceptance={choice.__name__} is a class; make an instance: acceptance={choice.__name__}()")
    if isinstance(choice, Rule):
        if not _usable(choice).lossless:
            name = type(choice).__name__
            raise OptionError(
                f"{name} is lossy (lossless = False): the tokens would not be the model's own. A lossy rule is taken "
                f"only by a name: emssd_compile.acceptance.RULES['...'] = {name} (or a function that makes one), then "
                "acceptance='...'"
            )
        return choice
    if choice == "auto":
        return Match()
    if not isinstance(choice, str) or choice not in RULES:
        raise OptionError(f"unknown acceptance rule {choice!r}; choose one of {['auto', *RULES]} or pass a Rule")
    return _usable(RULES[choice]())


def _usable(rule: Rule) -> Rule:
    if getattr(rule.forward, "__func__", None) is Rule.forward:
        raise RuleError(f"{type(rule).__name__} has no forward of its own; define forward(verification) -> Verdict")
    return check_rule(rule)
