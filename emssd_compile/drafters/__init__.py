"""Drafters: what proposes tokens. To add one: one file with a `Drafter`, one line in `DRAFTERS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from emssd_compile.checkpoints import read_names
from emssd_compile.drafters.block_drafter import BlockDrafter
from emssd_compile.drafters.corpus import Corpus
from emssd_compile.drafters.draft_model import DraftModel
from emssd_compile.drafters.dynamic_tree import DynamicTree
from emssd_compile.drafters.eagle3 import Eagle3
from emssd_compile.drafters.early_exit import EarlyExit
from emssd_compile.drafters.head import DraftHead
from emssd_compile.drafters.hybrid import Hybrid
from emssd_compile.drafters.marginal_tree import MarginalTree
from emssd_compile.drafters.medusa import Medusa
from emssd_compile.drafters.mlp_speculator import MLPSpeculator
from emssd_compile.drafters.mtp import MTP
from emssd_compile.drafters.multi_candidate import MultiCandidate
from emssd_compile.drafters.no_drafter import NoDrafter
from emssd_compile.drafters.parallel_draft_model import ParallelDraftModel
from emssd_compile.drafters.parallel_eagle import ParallelEagle
from emssd_compile.drafters.prompt_lookup import PromptLookup
from emssd_compile.drafters.recurrent import RecurrentDrafter
from emssd_compile.drafters.suffix_lookup import SuffixLookup
from emssd_compile.drafters.target_initialized import TargetInitialized
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.step.drafting import Draft, DraftContext, Drafter, check_drafter
from emssd_compile.step.parts import PartSizes, gather_tensors, tensors_of
from emssd_compile.step.tensor_spec import TensorSpec

DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "none": NoDrafter,
    "prompt-lookup": PromptLookup,
    "suffix": SuffixLookup,
}
HEADS: tuple[type[DraftHead], ...] = (MTP, BlockDrafter, Eagle3, MLPSpeculator, Medusa, ParallelEagle, RecurrentDrafter)
"""Kinds of draft heads: those that have checkpoints and are trained."""

__all__ = [
    "DRAFTERS",
    "HEADS",
    "MTP",
    "BlockDrafter",
    "Corpus",
    "Draft",
    "DraftContext",
    "DraftHead",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "Eagle3",
    "EarlyExit",
    "Hybrid",
    "MLPSpeculator",
    "MarginalTree",
    "Medusa",
    "MultiCandidate",
    "NoDrafter",
    "ParallelDraftModel",
    "ParallelEagle",
    "PartSizes",
    "PromptLookup",
    "RecurrentDrafter",
    "SuffixLookup",
    "TargetInitialized",
    "TensorSpec",
    "gather_tensors",
    "head_kind",
    "load_head",
    "make_drafter",
    "tensors_of",
    "without",
]


def without(drafter: Drafter) -> Drafter:
    """What stands in a step in the place of a drafter that is left out: what is cheap of it, or what drafts nothing.

    Raises:
        DrafterError: what `cheaper` gives is costly, or of another shape than the drafter.
    """
    cheaper = drafter.cheaper()
    if cheaper is None:
        return NoDrafter(drafter.taps)
    for name in ("num_draft_tokens", "max_depth", "num_grades", "taps", "proposes"):
        found, needed = getattr(cheaper, name), getattr(drafter, name)
        if found != needed:
            raise DrafterError(f"{type(drafter).__name__}.cheaper() has {name} = {found!r}; it must be {needed!r}")
    if cheaper.is_costly:
        raise DrafterError(f"{type(drafter).__name__}.cheaper() is costly itself; return None if nothing cheap is left")
    return check_drafter(cheaper)


def load_head(folder: str | Path, **options: Any) -> DraftHead:
    """A draft head of any kind from its checkpoint; `options` go to the head.

    Raises:
        CheckpointError: the folder holds no checkpoint of any of `HEADS`, or one that is damaged or does not fit.
        OptionError: an option is out of range.
    """
    kind = head_kind(folder)
    if kind is None:
        known = sorted({layout.name for head in HEADS for layout in head.layouts})
        raise CheckpointError(f"{folder} is no checkpoint of a draft head; these layouts are read: {', '.join(known)}")
    return kind.from_pretrained(folder, **options)


def head_kind(folder: str | Path) -> type[DraftHead] | None:
    """Of which of `HEADS` a folder holds a checkpoint; None if of none. Raises CheckpointError if it is damaged."""
    config, names = read_names(folder)
    return next((head for head in HEADS if head.layout_of(config, names)), None)


def make_drafter(choice: str | nn.Module) -> Drafter:
    """A drafter by name, the drafter given, or a causal LM wrapped into a `DraftModel`.

    Raises:
        OptionError: there is none of that name, or a class is given.
        DrafterError: an attribute of the drafter given makes no sense, or it has no `forward`.
    """
    if isinstance(choice, type):
        raise OptionError(f"drafter={choice.__name__} is a class; make an instance: drafter={choice.__name__}(...)")
    if isinstance(choice, Drafter):
        if getattr(choice.forward, "__func__", None) is Drafter.forward:
            raise DrafterError(f"{type(choice).__name__} has no forward of its own; define forward(context) -> Draft")
        without(check_drafter(choice))
        return choice
    if isinstance(choice, nn.Module):
        return DraftModel(choice)
    if not isinstance(choice, str) or choice not in DRAFTERS:
        raise OptionError(
            f"unknown drafter {choice!r}; choose one of {list(DRAFTERS)}, or pass a Drafter or a smaller causal LM"
        )
    return DRAFTERS[choice]()
