"""Each op that is written in ONNX operators here computes the same as in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from emssd_compile import ops
from emssd_compile.export.onnx.model import ModelOptions, write_model
from emssd_compile.export.onnx.session import open_session
from emssd_compile.ops._kept_threshold import reference as kept_threshold
from emssd_compile.passes.graph import output
from emssd_compile.passes.splice import Tensors, trace
from tests.export.opened import files_of, signature_of

ROWS, HEADS, KV_HEADS, QUERIES, CAPACITY, SIZE = 3, 4, 2, 3, 9, 8


def check(function: Callable[[Tensors], Tensor], inputs: Tensors, folder: Path, rtol: float = 1e-5) -> None:
    """Compare what ONNX Runtime computes with what the function does."""
    expected = function(inputs)
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes: Tensors = {name: fake_mode.from_tensor(value, static_shapes=True) for name, value in inputs.items()}
    graph_module = trace(lambda given: {"result": function(given)}, fakes, fake_mode)
    (results,) = output(graph_module.graph).args
    output(graph_module.graph).args = (dict(zip(("result",), results, strict=True)),)  # type: ignore[arg-type]
    graph_module.recompile()
    signature = signature_of(graph_module)
    details = write_model(graph_module, folder, (), ModelOptions(), signature)
    with files_of(folder) as files:
        step = open_session(files, details, signature, torch.device("cpu"))
    torch.testing.assert_close(step(*inputs.values())["result"], expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "softcap": 1.5},
        {"is_causal": False},
        {"is_causal": False, "mask": "bool", "softcap": 1.5},
        {"is_causal": False, "mask": "additive", "softcap": 1.5},
        {"is_causal": True, "sinks": True},
        {"is_causal": False, "mask": "bool", "sinks": True},
        {"is_causal": False, "mask": "additive", "sinks": True, "softcap": 1.5},
    ],
    ids=str,
)
def test_tiled_attention(options: dict[str, Any], tmp_path):
    """Rows of all lengths: one is full, one has fewer slots than queries, the first of which sees nothing.

    Behind every length lies NaN, and so it does in a key that a mask hides.
    """
    given = {
        "q": torch.randn(ROWS, HEADS, QUERIES, SIZE),
        "k": torch.randn(ROWS, KV_HEADS, CAPACITY, SIZE),
        "v": torch.randn(ROWS, KV_HEADS, CAPACITY, SIZE + 1),
        "lengths": torch.tensor([CAPACITY, 2, 5]),
    }
    for row, length in enumerate(given["lengths"].tolist()):
        given["k"][row, :, length:] = given["v"][row, :, length:] = torch.nan
    options = dict(options)
    kind, has_sinks = options.pop("mask", None), options.pop("sinks", False)
    if kind:
        visible = torch.rand(ROWS, 1 if kind == "bool" else HEADS, QUERIES, CAPACITY) < 0.6
        visible[..., 0], visible[..., 1] = True, False
        given["k"][:, :, 1] = torch.nan
        least = torch.finfo(torch.float32).min / 2
        given["mask"] = visible if kind == "bool" else torch.where(visible, torch.randn(visible.shape), least)
    if has_sinks:
        given["sinks"] = torch.tensor([0.5, -2.0, 9.0, -torch.inf])

    def attend(given: Tensors) -> Tensor:
        q, k, v, lengths = (given[name] for name in ("q", "k", "v", "lengths"))
        mask, sinks = given.get("mask"), given.get("sinks")
        result: Tensor = ops.tiled_attention(q, k, v, lengths, mask, scale=0.3, sinks=sinks, **options)
        return result[[0, 2]] if options["is_causal"] else result

    check(attend, given, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["causal", "additive"])
def test_tiled_attention_in_other_dtypes(dtype: torch.dtype, kind: str, tmp_path):
    """In half precision only the result is rounded; halves of lowest numbers hide in each dtype."""
    given = {name: torch.randn(ROWS, HEADS, QUERIES, SIZE).to(dtype) for name in ("q", "k", "v")}
    given["lengths"] = torch.tensor([3, 2, 1])
    if kind == "additive":
        visible = torch.tensor([True, False, True]).expand(ROWS, HEADS, QUERIES, QUERIES)
        given["mask"] = torch.randn(visible.shape).to(dtype).masked_fill(~visible, torch.finfo(dtype).min / 2)
        given["k"][:, :, 1] = torch.nan

    def attend(given: Tensors) -> Tensor:
        q, k, v, lengths = (given[name] for name in ("q", "k", "v", "lengths"))
        is_causal = "mask" not in given
        result: Tensor = ops.tiled_attention(
            q, k, v, lengths, given.get("mask"), scale=0.3, is_causal=is_causal, softcap=0.0 if is_causal else 2.0
        )
        return result[:, :, -1:]

    check(attend, given, tmp_path, rtol=torch.finfo(dtype).eps)


def test_update_kv(tmp_path):
    """Two tail tokens, which write to scratch alone."""
    given = {
        "cache": torch.randn(ROWS, KV_HEADS, CAPACITY, SIZE),
        "new": torch.randn(5, KV_HEADS, SIZE),
        "row_ids": torch.tensor([0, 0, 2, ROWS, ROWS]),
        "slots": torch.tensor([3, 4, 7, 0, 0]),
        "offsets": torch.tensor([0, 2, 2, 3]),
        "lengths": torch.tensor([3, 1, 7]),
    }
    check(lambda given: ops.update_kv(*given.values())[:, :, :-1] + 0, given, tmp_path)


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("size", [1, 70])
def test_kept_threshold(cuts, size, tmp_path):
    """Equal keys, infinite ones and NaN; rows that cut nothing off are among them, or all there are."""
    most = [0, 1, 5, 69, 70, 99, 0, 3, 5, 0, 2, 3] if cuts else [0, size, 99] * 4
    share = [1.0, 1.0, 0.5, 1.0, 0.9, 0.0, 0.99, 0.25, 0.999, 0.3, 0.7, 0.5] if cuts else [1.0] * 12
    keys = torch.randn(12, size).mul(4).round().div(2)
    keys[3, size // 2], keys[4, ::3], keys[5, 0], keys[6] = -torch.inf, -torch.inf, torch.inf, 2.0
    keys[7, size // 2] = torch.nan
    given = {"keys": keys, "weights": torch.rand(12, size), "most": torch.tensor(most), "share": torch.tensor(share)}
    expected = kept_threshold(*given.values())

    def same(given: Tensors) -> Tensor:
        found: Tensor = ops.kept_threshold(*(given[name] for name in ("keys", "weights", "most", "share")))
        return torch.where(found == given["expected"], 1.0, torch.where(found.isnan(), 2.0, 0.0))

    marks = same(given | {"expected": expected})
    assert marks.tolist() == [2.0 if row == 7 else 1.0 for row in range(12)]
    check(same, given | {"expected": expected}, tmp_path)


@pytest.mark.parametrize("descending", [False, True])
def test_stable_sort(descending, tmp_path):
    given = {"scores": torch.tensor([[1.0, 3.0, -torch.inf, 3.0, 1.0, 3.0, -torch.inf, 1.0]] * 3).repeat(1, 9)}
    check(lambda it: it["scores"].sort(dim=1, descending=descending, stable=True).indices, given, tmp_path)


@pytest.mark.parametrize("right", [False, True])
def test_searchsorted(right, tmp_path):
    given = {"ends": torch.tensor([2, 2, 5, 9]), "slots": torch.arange(12).reshape(3, 4)}
    check(lambda given: torch.searchsorted(given["ends"], given["slots"], right=right), given, tmp_path)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_cumprod(dim, dtype, tmp_path):
    check(lambda given: given["x"].cumprod(dim), {"x": torch.randint(-2, 3, (2, 3, 4)).to(dtype)}, tmp_path)


def test_cumprod_of_nothing(tmp_path):
    """A step without drafts has none to multiply."""
    check(lambda given: given["x"].cumprod(1).sum(1), {"x": torch.ones(2, 0)}, tmp_path)


def test_where_between_bools(tmp_path):
    given = {name: torch.tensor([[name == "x", True], [False, name == "y"]]) for name in ("c", "x", "y")}
    check(lambda given: torch.where(given["c"], given["x"], given["y"]), given, tmp_path)


@pytest.mark.parametrize("size", [0, 3])
def test_any(size, tmp_path):
    """Of nothing, too: among the drafts before the first one, say."""
    given = {"x": torch.tensor([[False] * 3, [False, True, True]])[:, :size]}
    check(lambda given: torch.cat([given["x"].any(1), given["x"].any(0, keepdim=True).flatten()]), given, tmp_path)
    check(lambda given: given["x"].any()[None], given, tmp_path)
