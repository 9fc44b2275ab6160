"""The demo models can be made again from nothing, and a run that was stopped ends as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo models are Hugging Face models")
pytest.importorskip("matplotlib", reason="train_demo.py draws its loss curve")

from transformers import AutoTokenizer, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where train_demo.py finds its neighbours when it runs

from demo_training import corpus, loop  # noqa: E402  found through the line above


def smoke(folder: Path, *arguments: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(EXAMPLES / "train_demo.py"), "--smoke", "--threads", "1", *arguments]
    folders = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    subprocess.run([*command, *folders], check=True, capture_output=True, text=True, timeout=300)
    facts: dict[str, dict[str, float]] = json.loads((folder / "out" / "training.json").read_text())
    return facts


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, smoke(folder)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_shipped_models_load_and_generate(shipped, name):
    folder = shipped[0] / "out" / name
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = json.loads((shipped[0] / "out" / "prompts.json").read_text())[0]["text"]
    ids = tokenizer(prompt, return_tensors="pt").input_ids[:, :16]
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 20)


def test_second_run_goes_on_at_the_checkpoint(shipped):
    folder, first = shipped
    second = smoke(folder, "--steps", "6", "--draft-steps", "5")
    assert (first["target"]["steps"], first["draft"]["steps"]) == (4, 4)
    assert (second["target"]["steps"], second["draft"]["steps"]) == (6, 5)


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 11))


def run_tiny(checkpoint: Path, stop_at: int | None = None) -> tuple[torch.nn.Module, loop.Run]:
    model, tokens = tiny_model(), torch.arange(400) % 11

    def windows(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        return loop.training_windows(tokens, step, steps=8, block=16, blocks_per_step=2)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return model, loop.fit(model, loss, windows, lambda: 0.0, 8, checkpoint)


def test_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    model, run = run_tiny(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "stopped.pt", stop_at=5)  # two steps after the checkpoint: they are lost and done again
    resumed_model, resumed_run = run_tiny(tmp_path / "stopped.pt")
    assert resumed_run.losses == run.losses
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], weight), name
    assert run.losses[-1] < run.losses[0]


def test_an_epoch_shows_every_block_once():
    tokens = torch.arange(16 * 10 + 17)
    steps_per_epoch = 5
    shown = [loop.training_windows(tokens, step, 100, block=16, blocks_per_step=2) for step in range(steps_per_epoch)]
    starts = torch.cat([rows[:, 0] for rows in shown]).sort().values
    assert (starts.diff() == 8).all()
    assert len(starts) == 20


def test_held_out_modules_are_never_trained_on():
    train, held_out = corpus.read_corpus()
    assert set(held_out) == set(corpus.HELD_OUT)
    assert not set(train.values()) & set(held_out.values())
    assert not set(train) & set(corpus.HELD_OUT)


def test_shipped_prompts_are_cut_from_held_out_modules():
    prompts = json.loads((EXAMPLES / "demo_model" / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model" / "target")
    sizes = [len(ids) for ids in tokenizer([prompt["text"] for prompt in prompts])["input_ids"]]
    assert len(prompts) == 32
    assert {prompt["module"] for prompt in prompts} == set(corpus.HELD_OUT)
    assert min(sizes) >= 30
    assert max(sizes) <= 450
    assert len(set(sizes)) > 20  # ragged
