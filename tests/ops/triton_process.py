"""Triton in a process of its own: whether it interprets, compiles or launches is settled when it is imported."""

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial

import pytest
import torch
from torch import Tensor

from emssd_compile.ops.triton.launch import Processors
from tests.ops.ragged import Batch

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton, of the dev extra")

Launched = tuple[str, tuple[int, ...], int]
"""Name, grid and bytes of shared memory of a kernel."""


class TritonProcess:
    """Calls the CUDA forms of the ops with CPU tensors; the process starts at the first call and ends with `close`.

    Args:
        capability: None interprets the kernels. Else they are compiled for a GPU of this capability, and not run.
    """

    def __init__(self, capability: int | None = None) -> None:
        self._start = interpret if capability is None else partial(_compile_for, capability)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=self._start)

    def attend(self, batch: Batch, **launch: int) -> Tensor:
        """`ragged_attention_triton`; `launch` changes fields of the planned launch."""
        return self._pool.submit(_attend, batch, launch).result()

    def append(
        self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`append_kv_triton`; the caches as it leaves them."""
        return self._pool.submit(_append, k_cache, v_cache, k, v, row_ids, slots).result()

    def move(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """`move_kv_triton`; the caches as it leaves them."""
        return self._pool.submit(_move, *arguments).result()

    def launched(self) -> list[Launched]:
        """The kernels that were compiled since the last call."""
        return self._pool.submit(_take_launched).result()

    def close(self) -> None:
        if "_pool" in vars(self):
            self._pool.shutdown()


def _attend(batch: Batch, changes: dict[str, int]) -> Tensor:
    from emssd_compile.ops.triton import launch, ragged_attention

    table = batch.options.get("block_table")
    sizes = ragged_attention.check_arguments(*batch.tensors, block_table=table)  # type: ignore[arg-type]
    planned = launch.plan_launch(sizes, _processors or ragged_attention.processors_of(batch.q.device))
    group = sizes.num_heads // sizes.num_kv_heads
    block_queries = changes.get("block_queries", planned.block_queries)
    tiles = launch.max_tiles(sizes.num_tokens, sizes.num_rows, group, block_queries)
    planned = replace(planned, **changes, num_tiles=tiles)
    return ragged_attention.ragged_attention_triton(*batch.tensors, **batch.options, launch=planned)  # type: ignore[arg-type]


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, row_ids: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    from emssd_compile.ops.triton.append_kv import append_kv_triton

    append_kv_triton(k_cache, v_cache, k, v, row_ids, slots)
    return k_cache, v_cache


def _move(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    from emssd_compile.ops.triton.move_kv import move_kv_triton

    move_kv_triton(*arguments)
    return arguments[0], arguments[1]


def interpret() -> None:
    """Makes this process interpret kernels: to be called before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # It holds bfloat16 as bits and multiplies the bits: https://github.com/triton-lang/triton/issues/11584
    dot = interpreter.InterpreterBuilder.create_dot

    def as_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, as_float(a), as_float(b), *rest)

    # Its scalars are arrays of one dimension, and numpy no longer converts those to int.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes that a program may have, by compute capability, as CUDA's programming guide has them."""

_launched: list[Launched] = []
_processors: Processors | None = None


def _take_launched() -> list[Launched]:
    taken = list(_launched)
    _launched.clear()
    return taken


class _Driver:
    """Of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_for(capability: int) -> None:
    global _processors
    from triton.runtime import driver, jit

    _processors = Processors(132, SHARED_MEMORY[capability])
    driver.set_active(_Driver(capability))
    run = jit.JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        _launched.append((self.__name__, grid, kernel.metadata.shared))
        return kernel

    jit.JITFunction.run = compile_only
