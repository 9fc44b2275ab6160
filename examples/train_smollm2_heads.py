"""Train draft heads for SmolLM2-135M-Instruct on conversations that it makes up.

    python examples/train_smollm2_heads.py --work build/smollm2 --out build/smollm2_heads
    python examples/train_smollm2_heads.py --work build/smollm2 --out build/smollm2_heads --rows 1024 --dtype bfloat16

Asked to go on where a user would speak, the model makes up a question; it answers that greedily, or every third one by
drawing. So no text is needed, and heads learn what they will have to draft. A run that was stopped goes on where it
was: conversations are kept in `--work`, 1024 to a file. On a GPU it takes minutes, on 2 cores many hours: begin there
with the `--conversations 2048` of the heads that are shipped, 2.4 hours for each. See examples/05_smollm2.py for what
has to be installed. What is shipped is in bf16.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/ is not part of the installed package
import emssd_compile as ec
from bench import real_models, shapes
from emssd_compile.cli import main as command_line
from emssd_compile.drafters import load_head
from emssd_compile.files import write_whole
from emssd_compile.training.data import read_documents

SIZES = {
    "recurrent": ["exit_size=64"],
    "eagle3": ["draft_vocabulary=4096", "owns_head=true"],
}
"""What is not as the kind has it by default: the heads of a model as small as this one are smaller."""

SHARD = 1024
QUESTION, ANSWER = 96, 256
"""Most tokens of each."""


class Conversations:
    """Makes conversations: a system prompt, a question, an answer.

    Args:
        model: a chat model.
        tokenizer: its own, with a chat template.
        rows: that decode at a time.
        backend: that they are decoded with.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int, backend: str) -> None:
        self._tokenizer, self._end = tokenizer, tokenizer.decode(model.generation_config.eos_token_id)
        chat = [{"role": "user", "content": "\0"}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        self._before, behind = whole.split("\0")
        self._behind = behind.removeprefix(self._end)
        length = len(tokenizer(whole)["input_ids"]) + QUESTION + ANSWER
        self._fast = ec.optimize(model, max_batch=rows, max_length=length, backend=backend)

    def make(self, seeds: range) -> list[str]:
        """One for each seed, but for questions that do not end, or that are asked twice."""
        said = self._go_on([self._before] * len(seeds), QUESTION, seeds, [True] * len(seeds))
        questions = dict.fromkeys(question for question in said if question.endswith(self._end))
        prompts = [self._before + question + self._behind for question in questions]
        answers = self._go_on(prompts, ANSWER, seeds, [place % 3 == 0 for place in range(len(prompts))])
        return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

    def _go_on(self, texts: list[str], tokens: int, seeds: range, draws: list[bool]) -> list[str]:
        """What the model says behind each text, up to the end of its turn; drawn or greedily."""
        if not texts:
            return []
        prompts = self._tokenizer(texts)["input_ids"]
        how = {"do_sample": draws, "seed": list(seeds[: len(texts)]), "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        rows = self._fast.generate(prompts, max_new_tokens=tokens, **how)
        return [self._tokenizer.decode(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]


def write_conversations(folder: Path, seeds: range, make: Callable[[range], list[str]]) -> Iterator[Path]:
    """Files of about one conversation a seed; those that are there are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(0, len(seeds), SHARD):
        file = folder / f"{place:06d}.jsonl"
        if not file.exists():
            made = make(seeds[place : place + SHARD])
            write_whole(file, "".join(json.dumps({"text": text}) + "\n" for text in made).encode())
        yield file


def main() -> int:
    """Make conversations, train the heads one after another; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="conversations and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="a folder for each kind is made in it")
    parser.add_argument("--kinds", nargs="*", choices=SIZES, default=list(SIZES), help="(default: all)")
    parser.add_argument("--conversations", type=int, default=16 * SHARD, help="to learn from (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="decoded at a time (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="eager", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens in a step (default: %(default)s)")
    options = parser.parse_args()
    folder = real_models.smollm2()
    files = texts(folder, options)
    for kind in options.kinds:
        command = ["train-drafter", "--model", str(folder), "--kind", kind, "--out", str(options.work / kind)]
        command += ["--data", *files["train"], "--held-out", *files["held_out"], "--no-distil"]
        command += ["--loss", "distribution", "--learning-rate", "1e-3", "--epochs", str(options.epochs)]
        command += ["--batch", str(options.batch), "--dtype", options.dtype, "--backend", options.backend]
        command += ["--sizes", *SIZES[kind]]
        if status := command_line(command):
            return status
        load_head(options.work / kind).to(torch.bfloat16).save_pretrained(options.out / kind)
    return 0


def texts(folder: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Files to learn from, and held out: of other seeds, and without what is held out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cache
    def conversations() -> Conversations:
        model = shapes.pretrained(folder, device, getattr(torch, options.dtype))
        return Conversations(model, AutoTokenizer.from_pretrained(folder), options.rows, options.backend)

    def make(seeds: range) -> list[str]:
        return [text for text in conversations().make(seeds) if text not in held_out]

    held_out: set[str] = set()
    count = options.conversations
    seeds = {"held_out": range(count, count + max(32, count // 50)), "train": range(count)}
    files: dict[str, list[str]] = {}
    for name, own in seeds.items():
        shards = write_conversations(options.work / name, own, make)
        files[name] = [str(file) for file in track(shards, f"conversations, {name}", total=-(-len(own) // SHARD))]
        held_out |= set(read_documents([Path(file) for file in files[name]]))
    return files


if __name__ == "__main__":
    sys.exit(main())
