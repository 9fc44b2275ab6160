from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import shapes
from emssd_compile.errors import OptionError
from tests.zoo import toy_model


@pytest.mark.parametrize(("name", "millions"), [("opt-2.7b", 2652), ("opt-6.7b", 6658), ("llama-3-8b", 8030)])
def test_a_published_shape_has_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.CONFIGS[name]())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
def test_random_weights_are_the_same_every_time_and_leave_the_callers_numbers_alone(name):
    before = torch.get_rng_state()
    first = shapes.build(name)
    torch.rand(1)
    second = shapes.build(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.set_rng_state(before)
    shapes.build(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_random_weights_give_finite_logits_and_text_that_moves(name, dtype):
    model = shapes.build(name, dtype=dtype)
    assert model.dtype == dtype
    assert not model.training
    tokens = list(shapes.demo_prompts()[0])
    start = len(tokens)
    for _ in range(24):
        logits = model(torch.tensor([tokens])).logits[0, -1].float()
        assert logits.isfinite().all()
        assert 0.3 < logits.std() < 3
        tokens.append(int(logits.argmax()))
    assert sum(a != b for a, b in pairwise(tokens[start:])) > 12


def test_the_demo_model_has_its_trained_weights():
    model = shapes.build("demo")
    prompt = torch.tensor([shapes.demo_prompts()[0]])
    with torch.inference_mode():
        loss = model(prompt, labels=prompt).loss
    assert loss < 5  # a guess among 4096 tokens costs 8.3


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"unknown model 'opt-7b'; choose one of demo, .*opt-6.7b.*tiny-opt"):
        shapes.build("opt-7b")


def test_a_model_can_have_fewer_layers_unless_it_is_trained():
    assert shapes.build("tiny-opt", layers=1).config.num_hidden_layers == 1
    assert shapes.build("tiny-opt").config.num_hidden_layers == 2
    with pytest.raises(OptionError, match="demo is trained"):
        shapes.build("demo", layers=1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_first_layers_of_a_model_compute_what_they_do_in_it(name):
    model, ids = toy_model(name), torch.tensor([[3, 1, 4, 1, 5]])
    first = shapes.first_layers(model, 1)
    whole, found = (each(ids, output_hidden_states=True).hidden_states for each in (model, first))
    assert len(found) == 2 < len(whole)
    assert torch.equal(found[0], whole[0])
    norm = next(module for path, module in first.named_modules() if path.endswith((".norm", ".ln_f")))
    assert torch.equal(found[1], norm(whole[1]))


def test_prompts_are_in_every_vocabulary():
    prompts = shapes.demo_prompts()
    assert len(prompts) == 32
    assert max(map(max, prompts)) < min(config().vocab_size for config in shapes.CONFIGS.values())
