"""Keep keys and values in 8 bits."""

from __future__ import annotations

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from emssd_compile.errors import UnsupportedModelError
from emssd_compile.ops._packed_kv import DTYPE, SCALE_BYTES
from emssd_compile.passes.block_tables import pageable, slabs
from emssd_compile.step.paging import DRAFTER


class PackCaches:
    """Let the target's caches hold packed vectors: a byte for each component, and 4 for a scale. This is lossy.

    The ops that use the caches see by their dtype that they are packed, so the graph stays as it is. A packed vector is
    a line of bytes, so rings, pools and accepted paths of trees move it like any other. Caches of a drafter's own stay
    as they are, since its layers are few.

        before:  %k_cache_0: f32[B,C,Hkv,D]
        after:   %k_cache_0: i8[B,C,Hkv,D + 4]

    Args:
        fake_mode: of the graph.
    """

    name = "pack_caches"

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode

    def run(self, graph_module: fx.GraphModule) -> int:
        """Pack the caches; returns how many.

        Raises:
            UnsupportedModelError: one of them is used by something that does not know packed vectors.
        """
        graph = graph_module.graph
        known = pageable(graph)  # the ops that know blocks are those that know packed vectors
        packed = [node for node in slabs(graph) if not str(node.target).startswith(DRAFTER)]
        if odd := [str(node.target) for node in packed if node not in known]:
            raise UnsupportedModelError(
                f"kv_dtype='int8': {', '.join(odd)} cannot be packed, since something beside attention reads it",
                remedy="leave kv_dtype out",
            )
        for node in packed:
            with self.fake_mode:
                *places, size = node.meta["val"].shape
                node.meta["val"] = node.meta["val"].new_empty((*places, size + SCALE_BYTES), dtype=DTYPE)
        return len(packed)
