from functools import partial

import pytest
import torch

from emssd_compile.errors import OptionError
from emssd_compile.training.features import FrozenTarget
from tests.passes.graphs import model_with_attention
from tests.training.toys import BATCH, WINDOW
from tests.zoo import VOCABULARY


@pytest.mark.parametrize("number", [BATCH, 1])
def test_hidden_states_taps_and_logits_are_the_models_own(model, target, number):
    """Also in a smaller batch, behind what an earlier one has left in the caches."""
    target.tap((0, -1))
    tokens = torch.randint(3, VOCABULARY, (number, WINDOW))
    inputs: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True)
    hook.remove()
    features, logits = target.read(tokens, with_logits=True)
    assert features.tokens.equal(tokens)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(features.hidden, expected.hidden_states[-1])
    close(features.taps[0], expected.hidden_states[1])
    close(features.taps[-1], inputs[0])
    close(logits, expected.logits)
    assert target.read(tokens)[1] is None


def test_a_hand_written_model_is_read_too():
    model = model_with_attention().eval()
    target = FrozenTarget(model, 2, 6)
    tokens = torch.randint(target.vocabulary, (2, 6))
    _, logits = target.read(tokens, with_logits=True)
    with torch.no_grad():
        expected = torch.cat([model(row[None]).reshape(1, 6, -1) for row in tokens])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_head_meets_tables_that_take_no_gradient(model, target):
    met = target.as_target()
    assert met.tables.embedding is not None
    assert not met.tables.embedding.requires_grad
    assert met.tables.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.get_input_embeddings().weight.requires_grad


def test_a_layer_that_is_not_there_is_refused(target):
    with pytest.raises(OptionError, match="layer 7"):
        target.tap((7,))
