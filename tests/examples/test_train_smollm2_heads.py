"""Conversations that a chat model makes up: whole turns, made once, and what is held out is not learnt."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the example's tokenizer is one of transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_smollm2_heads as example

END = "$"
QUESTIONS = ["why?$", "what", "why?$", "who?$", "how?$"]
"""By seed: the second does not end, the third was asked before."""


class Characters:
    """A tokenizer: one id a character."""

    def __call__(self, texts: str | list[str]) -> dict[str, Any]:
        ids = [[*text.encode()] for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    def decode(self, ids: int | list[int]) -> str:
        return bytes([ids] if isinstance(ids, int) else ids).decode()

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        return f"sys${chat[0]['content']}${'bot:' if options['add_generation_prompt'] else ''}"


class Scripted:
    """What is compiled: it asks by seed, and answers with the seed, and how it was drawn."""

    def generate(self, prompts: list[list[int]], *, seed: list[int], do_sample: list[bool], **options: Any) -> Any:
        texts = [bytes(prompt).decode() for prompt in prompts]
        said = [
            f"{'drawn' if draws else 'greedy'}$" if text.endswith("bot:") else QUESTIONS[each % len(QUESTIONS)]
            for text, each, draws in zip(texts, seed, do_sample, strict=True)
        ]
        return [[*prompt, *each.encode()] for prompt, each in zip(prompts, said, strict=True)]


@pytest.fixture
def conversations(monkeypatch):
    model = Namespace(generation_config=Namespace(eos_token_id=ord(END)))
    monkeypatch.setattr("train_smollm2_heads.ec.optimize", lambda *given, **options: Scripted())
    return example.Conversations(model, Characters(), 4, "eager")


def test_a_conversation_is_a_question_that_ends_and_its_answer(conversations):
    assert conversations.make(range(5)) == [
        "sys$why?$bot:drawn$",
        "sys$who?$bot:greedy$",
        "sys$how?$bot:greedy$",
    ]
    assert conversations.make(range(1, 2)) == []


def test_they_are_made_once_and_what_is_held_out_is_not_learnt(conversations, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "Conversations", lambda *given: conversations)
    monkeypatch.setattr("train_smollm2_heads.AutoTokenizer.from_pretrained", lambda folder: Characters())
    monkeypatch.setattr("train_smollm2_heads.shapes.pretrained", lambda *given: None)
    monkeypatch.setattr(example, "SHARD", 40)
    monkeypatch.setattr(conversations, "make", lambda seeds: [f"{seed % 70}" for seed in seeds])
    options = Namespace(work=tmp_path, conversations=60, dtype="float32", rows=4, backend="eager")
    files = example.texts(tmp_path, options)
    read = {
        name: [json.loads(line)["text"] for file in each for line in Path(file).read_text().splitlines()]
        for name, each in files.items()
    }
    assert read["held_out"] == [f"{seed % 70}" for seed in range(60, 92)]
    assert read["train"] == [f"{seed}" for seed in range(22, 60)]
    monkeypatch.setattr(conversations, "make", lambda seeds: pytest.fail("they are there"))
    assert example.texts(tmp_path, options) == files
