"""`branches`: a forward that branches on the number of tokens is captured as it is for every number of them."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._export.passes import replace_set_grad_with_hop_pass as hop_pass
from torch._export.utils import sequential_split

import emssd_compile
from emssd_compile.capture import capture
from emssd_compile.errors import UnsupportedModelError
from tests.exactness.models import Reference, prompt
from tests.passes.graphs import TinyModel, causal, eager, run
from tests.zoo import toy_model


def _branching(condition) -> TinyModel:
    """A model that doubles its hidden states where `condition(positions)` holds."""

    def local(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return x * 2 if condition(positions) else x + positions[..., None]

    return TinyModel(local, attend=causal)


@pytest.mark.parametrize(
    ("condition", "limit"),
    [
        (lambda p: p.max() + 1 > 20, 20),
        (lambda p: p.max() < 33, 33),
        (lambda p: torch.ones_like(p).sum() >= 40, 39),
        (lambda p: p[0, -1] >= 31, 31),
    ],
)
def test_one_way_up_to_the_longest_row_or_refused_with_the_limit(condition, limit):
    model = _branching(condition)
    for longest in (16, limit):
        graph_module = capture(model, longest)
        torch.testing.assert_close(run(graph_module, longest), eager(model, longest), rtol=1e-6, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match=f"something else for more than {limit} tokens") as caught:
        capture(model, limit + 1)
    assert caught.value.remedy == f"pass max_length={limit} or less"


def test_branches_that_compute_the_same_are_no_matter():
    def local(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
        if torch.arange(ids.shape[1]).max() > 20:
            m.training = False
        return x * 2

    model = TinyModel(local, attend=causal)
    torch.testing.assert_close(run(capture(model, 64), 40), eager(model, 40), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_turned_off_within_the_forward_make_no_graph_of_their_own(monkeypatch, enabled):
    def local(m: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(enabled):
            positions = torch.arange(ids.shape[1])
        return x + positions[None, :, None]

    model = TinyModel(local, attend=causal)
    split = Mock(wraps=sequential_split)
    monkeypatch.setattr(hop_pass, "sequential_split", split)
    with torch.enable_grad():
        torch.testing.assert_close(run(capture(model, 64), 40), eager(model, 40), rtol=1e-6, atol=1e-6)
        assert torch.is_grad_enabled()
    assert split.called is enabled, "what does change something is left to export"


def test_a_branch_on_token_ids_is_refused_in_a_line_that_names_the_place(capfd):
    model = TinyModel(lambda m, x, ids: x * 2 if (ids == 3).any() else x, attend=causal)
    with pytest.raises(UnsupportedModelError, match="a branch or a size depends on the value of a tensor") as caught:
        capture(model, 32)
    assert "test_branches.py:" in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "short and long factors": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 128,
        },
        64,
    ),
    "base that grows with the text": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 64,
        },
        64,
    ),
}


@pytest.mark.parametrize(("model_type", "overrides", "limit"), SCALINGS.values(), ids=SCALINGS)
def test_rotary_scaling_decodes_within_its_regime(model_type, overrides, limit):
    model = toy_model(model_type, **overrides)
    fast = emssd_compile.optimize(model, max_batch=2, max_length=limit, backend="eager")
    reference, prompts = Reference(model), [prompt(50), prompt(3)]
    assert fast.generate(prompts, max_new_tokens=12) == [[*ids, *reference(ids, 12)] for ids in prompts]


@pytest.mark.parametrize(("model_type", "overrides", "limit"), SCALINGS.values(), ids=SCALINGS)
def test_rotary_scaling_is_refused_across_regimes_without_a_word_beside_the_error(model_type, overrides, limit, capfd):
    model = toy_model(model_type, **overrides)
    capfd.readouterr()
    with pytest.raises(UnsupportedModelError, match=f"something else for more than {limit} tokens") as caught:
        emssd_compile.optimize(model, max_batch=2, max_length=128, backend="eager")
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""
