"""The compile order, from a captured forward to one decoding step.

    L0 captured --canonicalise--> L1 canonical --unpad--> L2 unpadded --fuse--> L3 step --target--> L3 for a target
                                                                               (--place--> L3 on rings or a pool)

Each tuple below is one stage; each level is verified when it is reached (`levels`).
"""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.passes.bar_unreadable import BarUnreadable
from emssd_compile.passes.drop_noops import DropNoops
from emssd_compile.passes.fuse_step import FuseStep
from emssd_compile.passes.keep_layers import KeepLayers
from emssd_compile.passes.levels import (
    verify_canonical,
    verify_captured,
    verify_lowerable,
    verify_step,
    verify_unpadded,
)
from emssd_compile.passes.lift_positions import LiftPositions
from emssd_compile.passes.lower_einsum import LowerEinsum
from emssd_compile.passes.lower_flex_attention import LowerFlexAttention
from emssd_compile.passes.manager import Level, Pass, PassManager, PassRecord, Refusal, drop_unused_weights
from emssd_compile.passes.prove_token_pointwise import ProveTokenPointwise
from emssd_compile.passes.raise_attention import RaiseAttention
from emssd_compile.passes.restore_all_logits import RestoreAllLogits
from emssd_compile.passes.select_logits import SelectLogits
from emssd_compile.passes.tap_features import TapFeatures
from emssd_compile.passes.token_rules import linear_rule, register_token_rule
from emssd_compile.passes.unpad_kv_cache import UnpadKVCache
from emssd_compile.passes.unpad_tokens import UnpadTokens
from emssd_compile.passes.unwrap_weights import UnwrapWeights
from emssd_compile.step.acceptance import check_rule
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import check_drafter

__all__ = [
    "Level",
    "PassManager",
    "PassRecord",
    "Refusal",
    "canonical",
    "captured",
    "drop_unused_weights",
    "linear_rule",
    "placed",
    "register_token_rule",
    "step",
    "tapped",
    "targeted",
    "thinned",
    "unpadded",
]


def captured() -> Level:
    """L0: what `capture` gives, in ATen ops."""
    return Level("L0", (UnwrapWeights(), LowerFlexAttention()), verify_captured)


def canonical(batch: BatchShape) -> Level:
    """L1: one attention op, positions from the input, nothing else mixes tokens."""
    return Level(
        "L1",
        (
            DropNoops(),
            RestoreAllLogits(),
            BarUnreadable(),  # behind it: the logits are [1, T, V] now
            RaiseAttention(batch.capacity),  # before positions are lifted: masks are recognised on 0, 1, 2, ...
            LowerEinsum(),  # after attention is raised, which reads einsums as they are
            LiftPositions(batch.capacity),
            ProveTokenPointwise(batch.capacity),  # last: what was wrongly left over is caught here
        ),
        verify_canonical,
    )


def unpadded(batch: BatchShape, fake_mode: FakeTensorMode) -> Level:
    """L2: packed rows, one KV slab a row, logits where needed."""
    return Level(
        "L2",
        (
            UnpadTokens(batch, fake_mode),
            SelectLogits(),  # needs the input `logit_index`, which unpad_tokens adds
            UnpadKVCache(batch, fake_mode),
        ),
        verify_unpadded,
    )


def thinned(layers: tuple[int, ...]) -> Level:
    """L2 still, with these decoder layers only."""
    return Level("L2", (KeepLayers(layers),), verify_unpadded)


def tapped(taps: tuple[int, ...]) -> Level:
    """L2 with the outputs of layers, too; behind it, since what a layer gives to others through caches is gone."""
    return Level("L2", (TapFeatures(taps),), verify_unpadded)


def step(fuse: FuseStep) -> Level:
    """L3: pack, run, accept, commit, draft and choose lengths as one graph.

    Raises:
        DrafterError, RuleError: an attribute of the drafter or the rule makes no sense.
    """
    check_rule(fuse.rule)
    check_drafter(fuse.drafter)
    return Level("L3", (fuse,), verify_step)


def placed(kinds: tuple[Pass, ...]) -> Level:
    """L3 still, with caches in other kinds of memory; before the passes of a target, which may see one more input."""
    return Level("L3", kinds, verify_step)


def targeted(own: tuple[Pass, ...]) -> Level:
    """The same graph with the ops that a target is fast at; targets name their own passes (`lowering`, `export`)."""
    return Level("target", own, verify_lowerable)
