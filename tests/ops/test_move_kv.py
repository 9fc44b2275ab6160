from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile import ops
from emssd_compile.ops import _move_kv
from tests.ops.moves import Moves, expected_caches, in_blocks, make_moves, same_bits

ROWS = [(5, [0, 2, 3]), (0, [0, 1, 2, 3]), (9, []), (2, [4]), (3, [0, 3, 4, 11])]

paths = st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 20)).map(sorted)), min_size=1, max_size=4)


def assert_moved(moves: Moves) -> None:
    expected = expected_caches(moves)
    ops.move_kv(*moves.tensors)
    assert same_bits(moves.k_cache, expected[0])
    assert same_bits(moves.v_cache, expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [ROWS, [(3, [0])], [(0, [7])], [(4, []), (0, [])], [(2, [1, 2, 3, 4, 5])], [(0, [0, 1, 2])]],
    ids=["ragged", "root only", "from the last slot", "nothing", "by one", "where they are"],
)
@pytest.mark.parametrize("spare_slots", [0, 3])
def test_moves_the_accepted_tokens_and_nothing_else(
    kernels: str, rows: list[tuple[int, list[int]]], dtype: torch.dtype, spare_slots: int
) -> None:
    assert_moved(make_moves(rows, width=5, dtype=dtype, spare_slots=spare_slots))
    assert_moved(in_blocks(make_moves(rows, width=5, dtype=dtype, spare_slots=spare_slots), 2))


@given(rows=paths, extra=st.integers(0, 3), spare_slots=st.integers(0, 3), page=st.sampled_from([None, 1, 4, 64]))
@pytest.mark.parametrize("form", [ops.move_kv, _move_kv.reference], ids=["cpp", "reference"])
def test_moves_any_path(
    cpu_kernels: None,
    form: Callable[..., None],
    rows: list[tuple[int, list[int]]],
    extra: int,
    spare_slots: int,
    page: int | None,
) -> None:
    width = max(len(nodes) for _, nodes in rows) + extra
    moves = make_moves(rows, width=width, spare_slots=spare_slots)
    moves = in_blocks(moves, page) if page else moves
    expected = expected_caches(moves)
    form(*moves.tensors)
    assert same_bits(moves.k_cache, expected[0])
    assert same_bits(moves.v_cache, expected[1])


def test_the_example_of_the_docstring(kernels: str) -> None:
    moves = make_moves([(5, [0, 2, 3])])
    fed = moves.k_cache[0, [5, 7, 8]]
    ops.move_kv(*moves.tensors)
    assert torch.equal(moves.k_cache[0, 5:8], fed)


def test_any_strides(kernels: str) -> None:
    moves = make_moves(ROWS)
    caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (moves.k_cache, moves.v_cache)]
    every_second = torch.stack([moves.starts, moves.counts], dim=1)
    path = moves.path.t().contiguous().t()
    assert_moved(Moves(caches[0], caches[1], every_second[:, 0], path, every_second[:, 1]))


def test_many_rows_on_several_threads(cpu_kernels: None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_moved(make_moves([(row % 7, range(0, 60, 3)) for row in range(64)], value_size=700))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([4, 1])}, "row 0 moves 4 tokens, its path has 3"),
        ({"counts": torch.tensor([3, -1])}, "row 1 moves -1 tokens"),
        ({"starts": torch.tensor([-1, 0])}, "row 0 starts at slot -1; the cache has 9 slots"),
        ({"starts": torch.tensor([6, 0])}, "row 0 moves node 3 behind slot 6 to depth 2; .* the cache has 9 slots"),
        ({"path": torch.tensor([[0, 2, 2], [0, 0, 0]])}, "row 0 moves node 2 behind slot 5 to depth 2; nodes must asc"),
        ({"path": torch.tensor([[-1, 2, 3], [0, 0, 0]])}, "row 0 moves node -1"),
        ({"path": torch.tensor([[0, 2, 3]])}, r"path \[B, N\] and counts \[B\] do not fit"),
        ({"k_cache": torch.zeros(3, 9, 2, 4)}, r"k_cache must be \[B, C, Hkv, D\] for 2 rows, got \[3, 9, 2, 4\]"),
        ({"v_cache": torch.zeros(2, 9, 4, 2).mT}, "the last dimension of v_cache must be contiguous"),
    ],
)
def test_cpp_form_refuses_what_would_reach_outside(cpu_kernels: None, change: dict[str, Tensor], message: str) -> None:
    moves = make_moves([(5, [0, 2, 3]), (0, [0])], spare_slots=0)
    before = moves.k_cache.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.move_kv(*replace(moves, **change).tensors)
    assert same_bits(moves.k_cache, before)


def test_cpp_form_refuses_blocks_that_there_are_not(cpu_kernels: None) -> None:
    moves = in_blocks(make_moves([(5, [0, 2, 3]), (0, [0])], spare_slots=0), 4)
    assert moves.block_table is not None
    for change in (-1, 9):
        table = moves.block_table.clone()
        table[0, 1] = change
        with pytest.raises(RuntimeError, match=f"slots 4 to 7 of row 0 are in block {change}; there are 6 blocks"):
            ops.move_kv(*replace(moves, block_table=table).tensors)


@pytest.mark.parametrize("page", [None, 4])
def test_opcheck(kernels: str, page: int | None) -> None:
    moves = make_moves(ROWS)
    torch.library.opcheck(ops.move_kv, (in_blocks(moves, page) if page else moves).tensors)


def test_compiled_step_moves_in_place(kernels: str) -> None:
    """What is written before is moved, what is read after has moved, and the caches are the caller's own."""

    def step(k_cache: Tensor, v_cache: Tensor, starts: Tensor, path: Tensor, counts: Tensor) -> Tensor:
        k_cache[:, -1] += 1.0
        torch.ops.emssd.move_kv(k_cache, v_cache, starts + 1, path, counts)
        return k_cache[:, 3] * 2

    moves = make_moves(ROWS)
    for cache in (moves.k_cache, moves.v_cache):
        cache.nan_to_num_(1.0)
    eager = Moves(moves.k_cache.clone(), moves.v_cache.clone(), moves.starts, moves.path, moves.counts)
    pointers = moves.k_cache.data_ptr(), moves.v_cache.data_ptr()
    result = torch.compile(step, fullgraph=True)(*moves.tensors)
    assert torch.equal(result, step(*eager.tensors))
    assert same_bits(moves.k_cache, eager.k_cache)
    assert same_bits(moves.v_cache, eager.v_cache)
    assert pointers == (moves.k_cache.data_ptr(), moves.v_cache.data_ptr())
