"""Acceptance rules: which drafts are kept, and which token follows them.

To add a rule: one file with a `Rule`, one line in `RULES`. A lossy rule is taken by its name only.
"""

from collections.abc import Callable
from functools import partial

from emssd_compile.acceptance.block import BlockVerification
from emssd_compile.acceptance.greedy import GreedyMatch
from emssd_compile.acceptance.k_seq import KSeq
from emssd_compile.acceptance.largest_ratio import LargestRatio
from emssd_compile.acceptance.match import TargetMatch
from emssd_compile.acceptance.recursive import RecursiveRejection
from emssd_compile.acceptance.token_level import TokenLevel
from emssd_compile.acceptance.traversal import TraversalVerification
from emssd_compile.acceptance.typical import TypicalAcceptance
from emssd_compile.errors import OptionError, RuleError
from emssd_compile.step.acceptance import GUARANTEES, Rule, Verdict, Verification, check_rule
from emssd_compile.step.drafting import Drafter
from emssd_compile.step.proposals import misfit

RULES: dict[str, Callable[[], Rule]] = {
    "match": TargetMatch,
    "greedy": GreedyMatch,
    "token-level": TokenLevel,
    "block": BlockVerification,
    "rrs": RecursiveRejection,
    "rrs-with-replacement": partial(RecursiveRejection, with_replacement=True),
    "k-seq": KSeq,
    "largest-ratio": LargestRatio,
    "traversal": TraversalVerification,
    "typical": TypicalAcceptance,
}

__all__ = [
    "GUARANTEES",
    "RULES",
    "BlockVerification",
    "GreedyMatch",
    "KSeq",
    "LargestRatio",
    "RecursiveRejection",
    "Rule",
    "TargetMatch",
    "TokenLevel",
    "TraversalVerification",
    "TypicalAcceptance",
    "Verdict",
    "Verification",
    "check_fit",
    "make_rule",
]


def make_rule(choice: str | Rule) -> Rule:
    """A rule by name, or the lossless rule given; `"auto"` gives the tokens of decoding without drafts.

    Raises:
        OptionError: there is none of that name, a class is given, or an object that is lossy.
        RuleError: the rule does not say what it guarantees, or has no `forward`.
    """
    if isinstance(choice, type):
        raise OptionError(f"acceptance={choice.__name__} is a class; make an instance: acceptance={choice.__name__}()")
    if isinstance(choice, Rule):
        if not _usable(choice).lossless:
            name = type(choice).__name__
            raise OptionError(
                f"{name} is lossy (guarantees = 'lossy'): the tokens would not be the model's own. A lossy rule is "
                f"taken only by a name: emssd_compile.acceptance.RULES['...'] = {name} (or a function that makes one), "
                "then acceptance='...'"
            )
        return choice
    if choice == "auto":
        return TargetMatch()
    if not isinstance(choice, str) or choice not in RULES:
        raise OptionError(f"unknown acceptance rule {choice!r}; choose one of {['auto', *RULES]} or pass a Rule")
    return _usable(RULES[choice]())


def check_fit(rule: Rule, drafter: Drafter) -> None:
    """Raises OptionError if the rule cannot verify what the drafter proposes; says which rules can."""
    if reason := misfit(rule, drafter):
        fitting = [name for name, make in RULES.items() if not misfit(make(), drafter)]
        raise OptionError(
            f"{reason}; pass another drafter (a smaller causal LM draws its drafts: in chains, or with "
            f"DraftModel(model, tree=...) in trees), or acceptance= one of {fitting}"
        )


def _usable(rule: Rule) -> Rule:
    if getattr(rule.forward, "__func__", None) is Rule.forward:
        raise RuleError(f"{type(rule).__name__} has no forward of its own; define forward(verification) -> Verdict")
    return check_rule(rule)
