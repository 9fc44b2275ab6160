"""TRL's own continuous batching, `use_transformers_continuous_batching`, with rollouts in its place."""

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="it is TRL that trains")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from emssd_compile.rollouts import Rollouts
from tests.exactness.models import build

GROUP, NEW, STEPS = 4, 6, 2
TEXTS = ["5 6 7 8", "9 4 3"]


class Compare(TrainerCallback):  # type: ignore[misc]
    """Greedy tokens after each step, by the model's `generate_batch` and by its own forward."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids, self.found, self.expected = ids, list[Any](), list[Any]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found = model.generate_batch(self.ids, config, progress_bar=False)
        self.found.append([each.generated_tokens for each in found.values()])
        model.eval()
        rows = [model.generate(torch.tensor([ids]), generation_config=config)[0].tolist() for ids in self.ids]
        self.expected.append([row[len(ids) :] for row, ids in zip(rows, self.ids, strict=True)])
        model.train()


@pytest.mark.long
def test_a_trainer_samples_with_rollouts_and_with_the_weights_of_each_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model: Any = build("llama")
    words = Tokenizer(models.WordLevel({str(token): token for token in range(model.config.vocab_size)}, "0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", padding_side="left")
    rollouts = Rollouts(seed=3, max_batch=4, max_length=32, backend="eager", layout="packed")
    rollouts.attach(model)
    compare = Compare(tokenizer(TEXTS)["input_ids"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_transformers_continuous_batching=True,
            max_steps=STEPS,
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
        processing_class=tokenizer,
        callbacks=[compare],
    )
    before = [parameter.clone() for parameter in model.parameters()]
    trainer.train()
    assert compare.found == compare.expected
    assert len(compare.found) == STEPS
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert rollouts.fast is not None
    assert rollouts.fast.stats.num_emitted_tokens > STEPS * GROUP * len(TEXTS)
