"""How drafts are drawn, and which rule goes with which drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emssd_compile.errors import RuleError

if TYPE_CHECKING:
    from emssd_compile.step.acceptance import Rule
    from emssd_compile.step.drafting import Drafter

DETERMINISTIC = "deterministic"
SAMPLED = "sampled"
WITHOUT_REPLACEMENT = "without replacement"

DRAWINGS = {
    DETERMINISTIC: "made by any means, the noise with which the target draws included; there is no q to divide by",
    SAMPLED: "drawn from q, siblings independently of one another",
    WITHOUT_REPLACEMENT: "drawn from q, siblings one after another, each from what the ones before it left of q",
}
"""How the drafts that follow a node may be made."""

CHAIN, TREE = "chain", "tree"


def misfit(rule: Rule, drafter: Drafter) -> str:
    """Why a rule cannot verify what a drafter proposes, as a clause; empty if it can."""
    if not drafter.num_draft_tokens:
        return ""
    of_rule, of_drafter = type(rule).__name__, type(drafter).__name__
    shape = CHAIN if drafter.max_depth is None else TREE
    if shape not in rule.shapes:
        return f"{of_rule} verifies {rule.shapes[0]}s, and {of_drafter} proposes {shape}s"
    if set(rule.accepts).isdisjoint(drafter.proposes):
        return f"{of_rule} needs drafts that are {_either(rule.accepts)}, and those of {of_drafter} are " + _either(
            drafter.proposes
        )
    return ""


def how_drawn(rule: Rule, drafter: Drafter) -> str:
    """How a drafter is to draw for a rule: in the first way of those that the rule accepts that the drafter knows.

    Raises:
        RuleError: there is none, or the rule does not verify drafts of that shape.
    """
    if reason := misfit(rule, drafter):
        raise RuleError(f"{reason}; choose another rule, or another drafter")
    return next((way for way in rule.accepts if way in drafter.proposes), DETERMINISTIC)


def _either(ways: tuple[str, ...]) -> str:
    return " or ".join(f"'{way}'" for way in ways)
