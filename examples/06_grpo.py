"""Reinforcement learning with TRL: GRPO on the shipped model, whose rollouts are sampled by a compiled one.

    pip install "emssd_compile[rl]"
    python examples/06_grpo.py
    python examples/06_grpo.py --steps 8 --backend inductor

The reward is how many of a completion's characters are letters. After each optimizer step the compiled model's greedy
tokens are compared with those of the trainer's model, which has the new weights; and the log-probabilities of each
rollout with those of the model's forward.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from emssd_compile.rollouts import Rollouts

DEMO_MODEL = Path(__file__).parent / "demo_model"
GROUP, NEW = 4, 16


def main() -> int:
    """Train and check; 1 if anything differed."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL / "target", padding_side="left")
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL / "target", dtype=torch.float32, **layers)
    texts = [entry["text"][:80] for entry in json.loads((DEMO_MODEL / "prompts.json").read_text())[:4]]
    rollouts = Checked(max_batch=2 * GROUP, max_length=128, backend=arguments.backend)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=letters,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=2 * GROUP,
                num_generations=GROUP,
                max_completion_length=NEW,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            rollout_func=rollouts,
            callbacks=[Compare(rollouts, tokenizer(texts)["input_ids"])],
        )
        trainer.train()
    return int(not rollouts.right)


class Checked(Rollouts):
    """Rollouts whose log-probabilities are compared with the model's own."""

    right = True

    def __call__(self, prompts: Any, trainer: Any) -> dict[str, list[Any]]:
        """A rollout."""
        found = super().__call__(prompts, trainer)
        rows = zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True)
        far = max((self._own(ids, new, trainer) - torch.tensor(told)).abs().max().item() for ids, new, told in rows)
        different = len({tuple(new) for new in found["completion_ids"][:GROUP]})
        print(f"rollout: {different} different completions in a group of {GROUP}; log-probabilities off by {far:.0e}")
        self.right &= far < 1e-3
        return found

    def _own(self, ids: list[int], new: list[int], trainer: Any) -> Tensor:
        """Log-probabilities by the model's forward, at the temperature that was sampled at."""
        assert self.fast is not None
        with torch.no_grad():
            logits = self.fast(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1] / trainer.temperature
        chosen: Tensor = logits.log_softmax(-1)[torch.arange(len(new)), new]
        return chosen


class Compare(TrainerCallback):  # type: ignore[misc]
    """Compares greedy tokens after each step."""

    def __init__(self, rollouts: Checked, ids: list[list[int]]) -> None:
        self.rollouts, self.ids = rollouts, ids

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The weights have just been written."""
        fast = self.rollouts.fast
        assert fast is not None
        model.eval()
        how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        found = fast.generate(self.ids, **how)
        expected = [model.generate(torch.tensor([ids]), **how)[0].tolist() for ids in self.ids]
        model.train()
        print(f"step {state.global_step}: tokens are those of the new weights: {'yes' if found == expected else 'NO'}")
        self.rollouts.right &= found == expected


def letters(completions: list[str], **_: Any) -> list[float]:
    """The reward."""
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="keep the first few only, to be quick")
    parser.add_argument("--backend", default="eager", help="eager or inductor (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
