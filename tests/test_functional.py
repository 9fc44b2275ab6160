"""`functional`: a captured forward gives what the model gives, whatever it writes, and is traced again if need be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.export import ExportedProgram

from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from tests.passes.graphs import TinyModel, causal, eager, ops, run
from tests.zoo import toy_model


def _write_own(model, x, ids):
    y = x * 2
    return y.add_(1).masked_fill_(ids[..., None] > 9, 0.5)


def _write_what_sort_gave(model, x, ids):
    values, places = x.sort(-1)
    values.div_(values.sum(-1, keepdim=True).abs() + 1)
    return x.scatter(-1, places, values)


def _cast_and_write(model, x, ids):
    y = x.to(torch.float64)
    y.mul_(3)
    return y.to(x.dtype) + x


def _other_words(model, x, ids):
    first, second = x.chunk(2, -1)
    y = torch.cat([first.reshape_as(second), second.type_as(first)], -1).unflatten(-1, (2, -1)).flatten(-2)
    return y @ model.dense.weight.T + F.dropout(y.contiguous(), 0.5, training=False).to("cpu")


def _write_into_a_view(model, x, ids):
    y = x * 2
    y[..., :4].add_(1)
    return y


def _write_under_a_view(model, x, ids):
    y = x * 2
    view = y[..., :4]
    y.add_(1)
    return torch.cat([view, y[..., 4:]], -1)


def _write_under_a_view_of_sorted(model, x, ids):
    values, _ = x.sort(-1)
    view = values.flip(-1)[..., :4] + values[..., :4].view_as(values[..., :4])
    kept = values[..., 4:]
    values.mul_(2)
    return torch.cat([view, kept], -1)


def _write_into_what_contiguous_gave(model, x, ids):
    y = torch.ops.aten.contiguous(x)  # the method leaves no op behind where it does nothing
    y.mul_(2)
    return y + x


def _write_into_what_to_gave(model, x, ids):
    y, z = x.to(torch.float32), x.to(torch.float32, copy=True)
    y.mul_(2)
    z.mul_(3)
    return y + z + x


def _write_into_what_type_as_gave(model, x, ids):
    y = x * 2
    kept = y.type_as(x)
    y.mul_(2)
    return y + kept


def _write_what_would_be_promoted(model, x, ids):
    y = x.to(torch.bfloat16)
    return y.add_(x).to(torch.float32) + (ids.to(torch.int8) + 1).bitwise_or_(ids.to(torch.int8))[..., None]


def _write_a_wider_dtype(model, x, ids):
    return x.to(torch.bfloat16).mul_(x * 3).mul(1.001).to(torch.float32)


def _view_of_tokens_by_tokens(model, x, ids):
    scores = (x @ x.transpose(-1, -2))[:, None].flatten(0, 1)
    return scores.softmax(-1) @ x


IN_PLACE = (_write_own, _write_what_sort_gave, _cast_and_write, _other_words)
AGAIN = (
    *(_write_into_a_view, _write_under_a_view, _write_under_a_view_of_sorted),
    *(_write_into_what_contiguous_gave, _write_into_what_to_gave, _write_into_what_type_as_gave),
    *(_write_what_would_be_promoted, _write_a_wider_dtype, _view_of_tokens_by_tokens),
)


@pytest.fixture
def traced_again(monkeypatch):
    """The programs that torch has traced again."""
    programs = []
    real = ExportedProgram.run_decompositions

    def noted(program, table):
        programs.append(program)
        return real(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return programs


@pytest.mark.parametrize("local", [*IN_PLACE, *AGAIN], ids=lambda local: local.__name__.strip("_"))
def test_a_forward_gives_what_the_model_gives(local, traced_again):
    model = TinyModel(local)
    graph_module = capture(model)
    assert bool(traced_again) == (local in AGAIN)
    for tokens in (1, 2, 7, 30):
        torch.testing.assert_close(run(graph_module, tokens), eager(model, tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("local", IN_PLACE, ids=lambda local: local.__name__.strip("_"))
def test_nothing_in_the_graph_writes(local):
    calls = [n.target for n in capture(TinyModel(local)).graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not any(op._schema.is_mutable for op in calls)


def test_a_cast_to_what_a_tensor_is_leaves_nothing():
    assert not {"to", "_to_copy"} & ops(capture(TinyModel(lambda m, x, ids: x.to(x.dtype).to("cpu")))).keys()


def test_a_write_into_a_weight_is_refused():
    def write(model, x, ids):
        model.table.add_(1)
        return x

    with pytest.raises(UnsupportedModelError, match="must not change state"):
        capture(TinyModel(write))


@pytest.mark.parametrize("model_type", ["llama", "bloom", "falcon", "mixtral", "cohere"])
def test_known_models_are_traced_once(model_type, traced_again):
    capture(toy_model(model_type).eval())
    assert not traced_again


def test_attention_is_traced_once(traced_again):
    capture(TinyModel(attend=causal))
    assert not traced_again
