import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emssd_compile.ops.triton import varlen
from tests.ops.ragged import Batch, Heads, make_batch, oracle, with_trees

HEADS = Heads(4, 2, 16, 16)


def emulated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
) -> Tensor:
    """What the documentation of `varlen_attn` says, row by row. What lies behind the last row is not written."""
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    out = torch.full_like(query, math.nan)
    left, right = window_size
    assert right == 0
    for row, num_keys in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[row : row + 2].tolist()
        assert end - begin <= max_q
        assert num_keys <= max_k
        first = int(cu_seq_k[row])
        group = query.shape[1] // key.shape[1]
        k = key[first : first + num_keys].double().repeat_interleave(group, dim=1)
        v = value[first : first + num_keys].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), k) * scale
        # Aligned at the bottom right: the last query sees the last key.
        distance = torch.arange(num_keys) - (torch.arange(end - begin)[:, None] + num_keys - (end - begin))
        visible = (distance <= 0) & (distance >= -left if left >= 0 else True)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)
    return out


def half_batch(rows: list[tuple[int, int]], heads: Heads = HEADS, tail: int = 0) -> Batch:
    return make_batch(rows, heads, tail=tail, dtype=torch.float16)


def applies(batch: Batch) -> bool:
    options = {name: value for name, value in batch.options.items() if name not in ("scale", "window")}
    return varlen.applies(batch.q, batch.k_cache, batch.v_cache, **options)  # type: ignore[arg-type]


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", emulated)
    monkeypatch.setattr(varlen, "is_available", lambda: True)


@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize("heads", [HEADS, Heads(2, 2, 8, 8)], ids=str)
def test_matches_oracle_and_zeroes_the_tail(emulation: None, heads: Heads, window: int) -> None:
    batch = half_batch([(20, 3), (0, 1), (5, 0), (16, 2)], heads, tail=2).with_options(window=window)
    result = varlen.ragged_attention_varlen(*batch.tensors, **batch.options)  # type: ignore[arg-type]
    torch.testing.assert_close(result.double(), oracle(batch), rtol=1e-3, atol=1e-3)
    assert not result[-2:].any()


@pytest.mark.parametrize(
    "unfit",
    [
        make_batch([(8, 2)], HEADS),  # float32
        half_batch([(8, 2)], Heads(4, 2, 12, 12)),
        half_batch([(8, 2)], Heads(4, 2, 16, 8)),
        half_batch([(8, 2)]).with_options(softcap=2.0),
        half_batch([(8, 2)]).with_options(alibi_slopes=torch.ones(4)),
        half_batch([(8, 2)]).with_options(sinks=torch.ones(4)),
        half_batch([(8, 2)]).with_options(chunk=8),
        with_trees(half_batch([(8, 2)])),
        replace(half_batch([(8, 2)]), k_cache=torch.zeros(1, 2, 13, 16, dtype=torch.float16).transpose(1, 2)),
    ],
    ids=["float32", "head size", "value size", "softcap", "alibi", "sinks", "chunk", "tree", "head-major cache"],
)
def test_does_not_apply(emulation: None, unfit: Batch) -> None:
    assert applies(half_batch([(8, 2)]))
    assert not applies(unfit)
    with pytest.raises(ValueError, match="varlen_attn cannot do this"):
        varlen.ragged_attention_varlen(*unfit.tensors, **unfit.options)  # type: ignore[arg-type]


def test_availability_is_what_the_installed_torch_can_do() -> None:
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    assert varlen.is_available() == ("seqused_k" in parameters)
    if varlen.is_available():
        assert {"scale", "window_size", "enable_gqa"} <= parameters.keys()
