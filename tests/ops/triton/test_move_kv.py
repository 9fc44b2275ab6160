from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.moves import Moves, expected_caches, in_blocks, make_moves, same_bits
from tests.ops.triton_process import TritonProcess, needs_triton

pytestmark = needs_triton

ROWS = [(5, [0, 2, 3]), (0, [0, 1, 2, 3]), (9, []), (2, [4]), (3, [0, 3, 4, 11])]


@pytest.fixture(scope="module")
def triton() -> Iterator[TritonProcess]:
    process = TritonProcess()
    yield process
    process.close()


def assert_moved(triton: TritonProcess, moves: Moves) -> None:
    expected = expected_caches(moves)  # before: the process moves in this one's memory
    moved = triton.move(*moves.tensors)
    assert same_bits(moved[0], expected[0])
    assert same_bits(moved[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [ROWS, [(3, [0])], [(4, []), (0, [])], [(2, [1, 2, 3, 4, 5])], [(0, [0, 1, 2])]],
    ids=["ragged", "root only", "nothing", "by one", "where they are"],
)
def test_moves_the_accepted_tokens_and_nothing_else(
    triton: TritonProcess, rows: list[tuple[int, list[int]]], dtype: torch.dtype
) -> None:
    assert_moved(triton, make_moves(rows, width=5, dtype=dtype))
    assert_moved(triton, in_blocks(make_moves(rows, width=5, dtype=dtype), 2))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 60)).map(sorted)), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    page=st.sampled_from([None, 4, 64]),
)
def test_moves_any_path(triton: TritonProcess, rows: list[tuple[int, list[int]]], extra: int, page: int | None) -> None:
    moves = make_moves(rows, width=max(len(nodes) for _, nodes in rows) + extra)
    assert_moved(triton, in_blocks(moves, page) if page else moves)


def test_a_path_of_several_blocks_of_tokens_and_of_elements(triton: TritonProcess) -> None:
    assert_moved(triton, make_moves([(2, range(1, 41)), (0, range(0, 80, 2)), (7, [0])], value_size=300))


def test_any_strides(triton: TritonProcess) -> None:
    moves = make_moves(ROWS)
    k_cache, v_cache = (cache.transpose(1, 3).contiguous().transpose(1, 3) for cache in (moves.k_cache, moves.v_cache))
    every_second = torch.stack([moves.starts, moves.counts], dim=1)
    path = moves.path.t().contiguous().t()
    assert_moved(triton, Moves(k_cache, v_cache, every_second[:, 0], path, every_second[:, 1]))


@pytest.mark.parametrize(("start", "path"), [(-1, [0, 2]), (4, [0, 6]), (4, [-3, -1]), (4, [2**62, -(2**62)])], ids=str)
def test_what_would_reach_outside_or_move_backwards_stays(triton: TritonProcess, start: int, path: list[int]) -> None:
    moves = make_moves([(4, [0, 3]), (0, [0, 5])], spare_slots=2)
    given = replace(moves, starts=torch.tensor([start, 0]), path=torch.tensor([path, [0, 5]]))
    expected = expected_caches(replace(moves, counts=torch.tensor([0, 2])))
    for cache, wanted in zip(triton.move(*given.tensors), expected, strict=True):
        assert same_bits(cache[1], wanted[1])
        if start >= 0:
            assert same_bits(cache[0], wanted[0])


def test_refuses_other_shapes(triton: TritonProcess) -> None:
    moves = make_moves(ROWS)
    for change in ({"counts": moves.counts[:-1]}, {"path": moves.path[0]}, {"v_cache": moves.v_cache[1:]}):
        with pytest.raises(RuntimeError, match=r"starts \[B\], path \[B, N\] and counts \[B\] do not fit"):
            triton.move(*replace(moves, **change).tensors)


def test_compiles_for_a_gpu() -> None:
    compiler = TritonProcess(capability=90)
    for width in (5, 1, 33):
        compiler.move(*make_moves([(row, [0]) for row in range(3)], width=width, dtype=torch.bfloat16).tensors)
    compiler.move(*in_blocks(make_moves([(row, [0]) for row in range(3)], dtype=torch.bfloat16), 4).tensors)
    assert [(kernel, grid) for kernel, grid, _ in compiler.launched()] == [("_move", (3, 1))] * 4
    compiler.close()
