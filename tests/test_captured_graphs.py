"""A later start reads the graph that an earlier one captured, of the same model; never that of another one."""

from __future__ import annotations

import functools
import os
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama
from transformers.utils import can_return_tuple

import emssd_compile
from emssd_compile import captured_graphs, identity, pipeline, reached_code
from emssd_compile.capture import capture
from emssd_compile.captured_graphs import CapturedGraph
from emssd_compile.errors import UnsupportedModelError
from emssd_compile.step.batch import BatchShape
from tests.passes.graphs import TinyModel, causal
from tests.quantised import with_weights
from tests.zoo import toy_model

LONGEST = 64
PROMPTS = [[1, 2, 3, 1, 2], [7, 8]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(captured_graphs, "cache_folder", lambda: tmp_path)


@pytest.fixture
def captures(monkeypatch) -> list[nn.Module]:
    """The models that were captured."""
    found = list[nn.Module]()

    def noted(model: nn.Module, longest: int) -> torch.fx.GraphModule:
        found.append(model)
        return capture(model, longest)

    monkeypatch.setattr(captured_graphs, "capture", noted)
    return found


def _optimized(model: nn.Module, **options: Any) -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(model, max_batch=2, max_length=LONGEST, backend="eager", **options)


def _tokens(fast: emssd_compile.OptimizedModel) -> list[list[int]]:
    return fast.generate(PROMPTS, max_new_tokens=12)


def _compiled(model: nn.Module) -> None:
    pipeline.compile_compared(model, BatchShape(2, LONGEST))


def _known_path(model: nn.Module, longest: int = LONGEST) -> Path | None:
    return captured_graphs._path(model, longest, identity.if_known(identity.code_of, model))


def _path(model: nn.Module, longest: int) -> Path:
    path = _known_path(model, longest)
    assert path is not None
    return path


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "captured_graphs").glob("*"))


# gpt_oss holds constants that its forward makes of numbers.
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_second_start_captures_nothing_and_gives_the_tokens_of_its_own_weights(family, captures):
    expected = _tokens(_optimized(toy_model(family)))
    again = _optimized(toy_model(family))
    assert len(captures) == 1
    assert _tokens(again) == expected
    assert again.explain().record("capture").notes == ("read: it was captured on an earlier start",)
    other = _tokens(_optimized(toy_model(family, seed=1)))
    assert len(captures) == 1
    assert other == _tokens(_optimized(_of_no_package(toy_model(family, seed=1)))) != expected
    assert len(captures) == 2


def _of_no_package(model: nn.Module) -> nn.Module:
    """The same model, which is captured each time."""
    model.register_forward_hook(lambda module, given, found: None)
    return model


def test_a_draft_model_and_layers_of_the_target_are_read_too(captures):
    target, draft = toy_model("llama"), toy_model("llama", seed=1, num_hidden_layers=1)
    expected = _tokens(_optimized(target, drafter=draft))
    assert captures == [target, draft]
    assert _tokens(_optimized(target, drafter=draft)) == expected == _tokens(_optimized(target, drafter="none"))
    assert captures == [target, draft]


def _held(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def _configured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.rms_norm_eps *= 2


def _listed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.limits = {"longest": [24]}


def _patched_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model.norm), "forward", torch.nn.Identity.forward)


def _patched_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.rotate_half)


def _registered(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = modeling_llama.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(attention._global_mapping, "sdpa", attention["flash_attention_2"])


def _class_constant(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model.norm), "offset", 1.0, raising=False)


def _patched_property(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.model.norm), "variance_epsilon", property(nn.Module.extra_repr), raising=False)


def _module_constant(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "SIZES", [70, 90], raising=False)


def _default(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.eager_attention_forward, "__defaults__", (0.5,))


def _keyword_default(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils.sdpa_mask, "__kwdefaults__", {"local_size": 70})


def _far_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by what the model's module calls."""
    monkeypatch.setattr(masking_utils, "sdpa_mask", masking_utils.eager_mask)


def _registered_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, "sdpa", masks["eager"])


def _of_torch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "silu", nn.functional.gelu)


def _released(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = identity.package
    monkeypatch.setattr(identity, "package", lambda name: (package(name)[0] + "+1", package(name)[1]))


def _rewritten(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "own_sources", lambda: "other sources")


def _exchanged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    model.model.layers[0].self_attn = model.model.layers[1].self_attn


def _tied(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def _narrower(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].mlp.half()


def _transposed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()


def _with_bias(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(model.lm_head.out_features))


def _other_activation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _default_dtype(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)


CHANGES = (
    *(_held, _configured, _listed, _patched_class, _patched_function, _registered, _released, _rewritten),
    *(_class_constant, _patched_property, _module_constant, _default, _keyword_default),
    *(_far_function, _registered_mask, _of_torch),
    *(_exchanged, _tied, _narrower, _transposed, _with_bias, _other_activation, _default_dtype),
)


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_what_a_graph_follows_from_has_another_graph(change, monkeypatch):
    model = toy_model("llama")
    before = _known_path(model)
    assert before is not None
    assert before == _known_path(toy_model("llama", seed=1))
    assert before != _known_path(model, LONGEST + 1)
    change(model, monkeypatch)
    assert _known_path(model) not in {before, None}


class _Own(nn.Linear):
    """A class of no package."""


def _hooked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.register_forward_hook(lambda module, given, found: found)


def _of_own_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.lm_head.__class__ = _Own


def _own_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def _own_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(module, query, key, value, mask, **options):
        return query.transpose(1, 2), None

    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)


def _holds_a_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.scale = lambda hidden: hidden


def _holds_a_tensor(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.scale = torch.ones(())


def _holds_something(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.norm.generator = torch.Generator()


def _wrapped(function: Any) -> Any:
    """An own function that says of itself that it is another one."""

    @functools.wraps(function)
    def wrapper(*given: Any, **options: Any) -> Any:
        return function(*given, **options)

    return wrapper


def _wrapped_method(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", _wrapped(modeling_llama.LlamaMLP.forward))


def _wrapped_of_torch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", _wrapped(nn.Linear.forward))


def _wrapped_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _wrapped(modeling_llama.apply_rotary_pos_emb))


def _own_kernel(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: q)


def _own_tensor_method(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "transpose", lambda tensor, first, second: tensor.swapaxes(first, second))


def _own_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, "sdpa", lambda *given, **options: None)


def _without_positions(q: Any, k: Any, *rotations: Any) -> Any:
    return q, k


def _own_partial(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", functools.partial(_without_positions))


class _Called:
    def __call__(self, *given: Any) -> Any:
        return given[:2]


def _own_object(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _Called())


def _in_a_closure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decorator of transformers, around an own function."""
    monkeypatch.setattr(
        modeling_llama.LlamaModel, "forward", can_return_tuple(_wrapped(modeling_llama.LlamaModel.forward))
    )


class _Shy:
    __class__ = property(lambda self: 1 / 0)


def _names_what_hides(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "logger", _Shy())


NAMELESS = (
    *(_hooked, _of_own_class, _own_function, _own_attention, _holds_a_function, _holds_a_tensor, _holds_something),
    *(_wrapped_method, _wrapped_of_torch, _wrapped_function, _own_kernel, _own_mask, _own_partial, _own_object),
    *(_in_a_closure, _own_tensor_method, _names_what_hides),
)


@pytest.mark.parametrize("change", NAMELESS)
def test_where_it_cannot_be_told_what_a_graph_follows_from_none_is_kept(change, tmp_path, monkeypatch):
    model = toy_model("llama")
    change(model, monkeypatch)
    CapturedGraph(model, LONGEST).keep()
    assert _files(tmp_path) == []


def _partials() -> list[Any]:
    return [functools.partial(modeling_llama.repeat_kv, n_rep=n) for n in (1, 2)]


def _objects() -> list[Any]:
    found = [_Called(), _Called()]
    for number, each in enumerate(found):
        vars(each)["scale"] = [modeling_llama.repeat_kv, modeling_llama.rotate_half][number]
    return found


def _closures() -> list[Any]:
    def scaled(scale: float) -> Any:
        return lambda q, k, *others: (q * scale, k)

    return [scaled(1.0), scaled(2.0)]


@pytest.mark.parametrize("replacements", [_partials, _objects, _closures])
def test_replacements_of_one_kind_are_told_apart(replacements, monkeypatch):
    monkeypatch.setattr(reached_code, "_installed", lambda: ("",))  # as if these tests were a package
    model, paths = toy_model("llama"), []
    for each in replacements():
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", each)
        paths.append(_path(model, LONGEST))
    assert paths[0] != paths[1]


def test_versions_say_what_is_within_only_if_an_index_or_a_commit_does(monkeypatch):
    model, found = toy_model("llama"), []
    read = metadata.PathDistribution.read_text
    for source in ('{"vcs_info": {"commit_id": "a"}}', '{"vcs_info": {"commit_id": "b"}}', '{"dir_info": {}}'):
        monkeypatch.setattr(
            metadata.PathDistribution,
            "read_text",
            lambda self, name, source=source: source if name == "direct_url.json" else read(self, name),
        )
        found.append(_known_path(model))
    assert found[0] != found[1]
    assert None not in found[:2]
    assert found[2] is None


def test_a_hand_written_model_is_captured_each_time(captures, tmp_path):
    model = TinyModel(lambda m, x, ids: x, attend=causal)
    for _ in range(2):
        _compiled(model)
    assert len(captures) == 2
    assert _files(tmp_path) == []


def test_a_graph_that_is_not_the_models_is_captured_anew(captures, tmp_path):
    model, other = toy_model("llama"), toy_model("llama", rms_norm_eps=0.5)
    expected = _tokens(_optimized(other))
    (kept,) = _files(tmp_path)
    kept.rename(_path(model, LONGEST))
    found = _tokens(_optimized(model))
    assert captures == [other, model]
    assert found == _tokens(_optimized(model)) != expected
    assert captures == [other, model]  # what was wrong has been written over


SPOILT = [b"", b"nothing", slice(0, -9), *(zlib.compress(text) for text in (b"{}", b"[]", b'{"nodes": []}'))]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_cannot_be_read_is_captured_anew(spoilt, captures, tmp_path):
    model = toy_model("llama")
    _compiled(model)
    (kept,) = _files(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(spoilt if isinstance(spoilt, bytes) else whole[spoilt])
    _compiled(model)
    assert len(captures) == 2
    assert kept.read_bytes() == whole


def test_a_folder_that_can_only_be_read_is_read(captures, monkeypatch):
    model = toy_model("llama")
    _compiled(model)

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refuse)
    _compiled(model)
    assert captures == [model]


def test_what_was_refused_is_not_kept(tmp_path, monkeypatch):
    def refuse(model: nn.Module, compiled: object, code: object) -> None:
        raise UnsupportedModelError("it is another model")

    monkeypatch.setattr(pipeline, "check_against", refuse)
    with pytest.raises(UnsupportedModelError, match="another model"):
        _compiled(toy_model("llama"))
    assert _files(tmp_path) == []


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/within"])
def test_where_nothing_can_be_kept_models_are_captured_each_time(place, captures, monkeypatch):
    monkeypatch.setattr(captured_graphs, "cache_folder", lambda: Path(place))
    for _ in range(2):
        _compiled(toy_model("llama"))
    assert len(captures) == 2


def test_those_that_were_used_last_are_kept(captures, tmp_path, monkeypatch):
    monkeypatch.setattr(captured_graphs, "_MOST", 2)
    model = toy_model("llama")
    for longest in (40, 41, 40, 42):
        pipeline.compile_compared(model, BatchShape(2, longest))
    assert len(captures) == 3
    assert {path.name for path in _files(tmp_path)} == {_path(model, longest).name for longest in (40, 42)}


def test_weights_that_wrap_others_are_told_by_what_they_wrap(captures, monkeypatch):
    monkeypatch.setattr(reached_code, "_installed", lambda: ("",))  # as if these tests were a package
    monkeypatch.setattr(identity, "package", lambda name: ("1", "/"))
    model, again = toy_model("llama"), toy_model("llama")
    with_weights(model)
    with_weights(again)
    assert _tokens(_optimized(model)) == _tokens(_optimized(again))
    assert captures == [model]
    before = _path(model, LONGEST)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.integers = weight.integers.to(torch.int16)
    assert _path(model, LONGEST) != before
