"""Text of the demo models: the running Python's standard library, its tokenizer and its held-out prompts.

The source files are read from the interpreter that runs this script and are covered by the PSF licence (PSF-2.0).
Nothing is downloaded.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "csv.py",
    "fnmatch.py",
    "getopt.py",
    "glob.py",
    "graphlib.py",
    "heapq.py",
    "netrc.py",
    "queue.py",
    "sched.py",
    "selectors.py",
    "shlex.py",
    "textwrap.py",
    "timeit.py",
)
"""Modules that neither the tokenizer nor the models ever see in training."""

# Tests repeat themselves, encodings and pydoc_data are tables: both teach little about how modules are written.
EXCLUDED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
EXCLUDED_PREFIX = "_sysconfigdata"  # build variables of this machine


def read_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Return the training and the held-out documents as ``{path: text}``, in a fixed order and without duplicates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or path.name.startswith(EXCLUDED_PREFIX):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            (held_out if relative.as_posix() in HELD_OUT else train)[relative.as_posix()] = text
    return train, held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries, the end-of-text token (id 0) included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """Tokenize the documents into one stream ``int64[tokens]``, the end-of-text token after each."""
    stream: list[int] = []
    for ids in tokenizer(list(texts))["input_ids"]:
        stream.extend([*ids, tokenizer.eos_token_id])
    return torch.tensor(stream, dtype=torch.int64)


def cut_prompts(
    tokenizer: PreTrainedTokenizerFast, held_out: dict[str, str], per_module: int = 2
) -> list[dict[str, str]]:
    """Cut `per_module` prompts of ragged length (about 40 to 400 tokens) out of each held-out module.

    Every prompt starts at the beginning of a line and stops at the end of an indented one, so that the model has to go
    on in the middle of a definition. The places depend on the text alone.
    """
    prompts: list[dict[str, str]] = []
    for module, text in held_out.items():
        lines = text.split("\n")
        sizes = [len(ids) for ids in tokenizer([line + "\n" for line in lines])["input_ids"]]
        for part in range(per_module):
            wanted = 40 + 97 * len(prompts) % 350
            stop = len(lines) * (part + 1) // (per_module + 1)
            while not lines[stop].startswith("    ") or sum(sizes[: stop + 1]) < wanted:
                stop += 1
            start = stop
            while sum(sizes[start : stop + 1]) < wanted or not lines[start].strip():
                start -= 1
            prompts.append({"module": module, "text": "\n".join(lines[start : stop + 1])})
    return prompts
