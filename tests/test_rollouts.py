"""Rollouts: what a GRPO trainer is told, by a trainer that only has what they read of one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="trainers hand over its generation configs")

from transformers import ContinuousBatchingConfig, GenerationConfig

from emssd_compile.rollouts import Rollouts
from tests.exactness.models import build

NEW, TEMPERATURE = 6, 0.7
OPTIONS: dict[str, Any] = {"max_batch": 3, "max_length": 32, "backend": "eager", "layout": "packed"}
PROMPTS = ["abc", "abc", "abc", [{"role": "user", "content": "xy"}]]


class Letters:
    """A tokenizer of letters, and a chat template that puts a 1 before and a 2 behind."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert return_dict
        return {"input_ids": [1, *(token for each in messages for token in self(each["content"])["input_ids"]), 2]}


def _trainer(model: Any, rank: int = 0) -> Any:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, temperature=TEMPERATURE, top_k=0, pad_token_id=0)
    return SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped, num_processes=2, process_index=rank),
        generation_config=config,
        model=model,
        processing_class=Letters(),
    )


def _far(found: dict[str, list[Any]], model: Any) -> float:
    """How far the log-probabilities are from those of the model's forward."""
    most = 0.0
    for ids, new, told in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1] / TEMPERATURE
        own = logits.log_softmax(-1)[torch.arange(len(new)), new]
        most = max(most, (own - torch.tensor(told)).abs().max().item())
    return most


def test_a_rollout_is_of_the_weights_as_they_are():
    model: Any = build("llama")
    trainer, rollouts = _trainer(model), Rollouts(seed=3, **OPTIONS)
    model.train()
    model.model.layers[0].eval()  # somebody has frozen it
    modes = [module.training for module in model.modules()]
    first = rollouts(PROMPTS, trainer)
    assert [module.training for module in model.modules()] == modes
    letters = Letters()("abc")["input_ids"]
    assert first["prompt_ids"] == [letters] * 3 + [[1, *Letters()("xy")["input_ids"], 2]]
    assert len({tuple(new) for new in first["completion_ids"][:3]}) == 3
    assert {len(new) for new in first["completion_ids"]} == {NEW}
    assert _far(first, model) < 1e-4
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    second = rollouts(PROMPTS, trainer)
    assert _far(first, model) > 0.1
    assert _far(second, model) < 1e-4
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    again = Rollouts(seed=3, **OPTIONS)
    assert again(PROMPTS, trainer) == first
    assert again(PROMPTS, trainer)["completion_ids"] != first["completion_ids"]


def _generated(model: Any, **options: Any) -> list[list[int]]:
    """What TRL's GRPOTrainer does with `use_transformers_continuous_batching=True`."""
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **options)
    batching = ContinuousBatchingConfig()
    prompts = [Letters()("abc")["input_ids"]] * 3
    with torch.no_grad():
        found = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
    model.train()
    return [each.generated_tokens for each in found.values()]


def test_a_model_that_they_are_attached_to_samples_with_them_with_its_weights_as_they_are():
    model: Any = build("llama")
    rollouts = Rollouts(seed=3, **OPTIONS)
    rollouts.attach(model)
    model.train()
    assert len({tuple(new) for new in _generated(model, do_sample=True, top_k=0)}) == 3
    ids = torch.tensor([Letters()("abc")["input_ids"]])
    seen = []
    for _ in range(2):
        found = _generated(model, do_sample=False)
        model.eval()
        expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
        model.train()
        assert found == [expected] * 3
        seen.append(expected)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
    assert seen[0] != seen[1]
    assert rollouts.fast is not None
    assert rollouts.fast.stats.num_emitted_tokens == 9 * NEW


def test_processes_draw_other_members_of_a_group():
    model: Any = build("llama")
    found = [Rollouts(seed=3, **OPTIONS)(PROMPTS[:2], _trainer(model, rank))["completion_ids"] for rank in (0, 1)]
    assert len({tuple(new) for new in found[0] + found[1]}) == 4


def test_what_trainers_do_for_the_backward_pass_is_no_change_of_the_model():
    model: Any = build("llama")
    trainer, rollouts = _trainer(model), Rollouts(**OPTIONS)
    model.gradient_checkpointing_enable()
    rollouts(PROMPTS, trainer)
    fast = rollouts.fast
    for change in (model.enable_input_require_grads, model.gradient_checkpointing_disable):
        change()
        assert _far(rollouts(PROMPTS, trainer), model) < 1e-4
    assert rollouts.fast is fast
