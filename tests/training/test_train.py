"""The whole of a run: killed, started by a launcher, on the target's own words."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import emssd_compile
from emssd_compile.drafters import HEADS, Eagle3, load_head
from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.train import Texts, train
from tests.training.tiny_head import TinyHead
from tests.training.toys import BATCH, TEXT, WINDOW, Characters, options, toy_target, trainer

ROOT = Path(__file__).parents[2]
MEASURED = {"mean_acceptance_length": 1.0}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from emssd_compile.training.features import FrozenTarget
from emssd_compile.training.processes import launched
from tests.training.toys import BATCH, WINDOW, toy_target, trainer

out, given = Path(sys.argv[1]), json.loads(sys.argv[2])
dropout = given.pop("dropout", 0.1)
with launched("cpu") as (processes, _):
    torch.manual_seed(0)
    target = FrozenTarget(toy_target(), BATCH, WINDOW)
    torch.manual_seed(0)
    made = trainer(target, out, processes, **given)
    made.head.dropout.p = dropout
    progress = made.run()
    if processes.is_main_process:
        made = {"curve": progress.curve, "held_out": list(progress.held_out.values())}
        (out / "progress.json").write_text(json.dumps(made))
"""


def started(out: Path, *launcher: str, **given: Any) -> subprocess.Popen[str]:
    """A process, or several, that train with as many threads as this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(out), json.dumps(given)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def texts() -> Texts:
    return Texts([TEXT], [], Characters())


def test_a_process_that_was_killed_is_gone_on_with_as_if_it_had_not_been(tmp_path):
    torch.manual_seed(0)
    own = FrozenTarget(toy_target(), BATCH, WINDOW)
    given: dict[str, Any] = {"epochs": 12, "checkpoint_every": 1}
    process = started(tmp_path / "cut", **given)
    checkpoint = tmp_path / "cut" / "work" / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    torch.manual_seed(0)
    expected = trainer(own, tmp_path / "whole", **given).run()
    seen: list[int] = []
    progress = trainer(own, tmp_path / "cut", **given).run(lambda progress: seen.append(progress.steps))
    assert seen[0] > 1
    assert progress == expected


class Killed(BaseException):
    """Nothing catches it, as nothing does a kill."""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_a_run_that_is_killed_while_it_writes_ends_as_if_it_had_not_been(seed, model, target, tmp_path, monkeypatch):
    """At a random file of each stage (continuations, checkpoints, the head), before or after it is there."""
    random = Random(seed)
    monkeypatch.setattr("emssd_compile.training.train.FrozenTarget", lambda *given: target)
    monkeypatch.setattr("emssd_compile.training.report.measure_acceptance", lambda *given: MEASURED)
    monkeypatch.setattr("emssd_compile.training.continuations._SHARD", 8)
    written: list[str] = []
    fatal: tuple[str, int, bool] | None = None
    replace = Path.replace

    def replace_or_die(self: Path, file: Path) -> Path:
        written.append(file.name)
        if fatal is None or (file.name, written.count(file.name)) != fatal[:2]:
            return replace(self, file)
        if fatal[2]:
            replace(self, file)
        raise Killed

    monkeypatch.setattr(Path, "replace", replace_or_die)

    def run(name: str) -> None:
        written.clear()
        train(model, TinyHead, texts(), tmp_path / name, options(distil=True, epochs=4, temperature=1.0))

    run("whole")
    stages = {
        "continuations": [name for name in written if name.startswith(("training-", "held-out-"))],
        "checkpoints": [name for name in written if name == "checkpoint.safetensors"],
        "the head": ["model.safetensors", "config.json", "curve.csv", "training.json"],
    }
    assert min(len(each) for each in stages.values()) >= 3
    for stage, names in stages.items():
        which = random.randrange(len(names) - 1) if stage == "checkpoints" else 0
        fatal = random.choice(names), 1 + which, random.random() < 0.5
        with pytest.raises(Killed):
            run("cut")
    fatal = None
    run("cut")
    assert not {name for name in written if name.startswith(("training-", "held-out-"))}, "these were there"
    for name in ("model.safetensors", "config.json", "curve.csv", "training.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.parametrize(
    ("launcher", "accumulate"), [("torchrun", 2), pytest.param("accelerate", 1, marks=pytest.mark.long)]
)
def test_two_processes_share_each_step(launcher, accumulate, target, tmp_path):
    """Their steps, and looks at what is held out, are those of one process with twice the batches a step."""
    given: dict[str, Any] = {"epochs": 2, "dropout": 0.0, "accumulate": accumulate}
    process = started(tmp_path / "two", *LAUNCHERS[launcher], **given)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    torch.manual_seed(0)
    one = trainer(target, tmp_path / "one", epochs=2, accumulate=2 * accumulate)
    one.head.dropout.p = 0.0  # type: ignore[union-attr]
    expected = one.run()
    made = json.loads((tmp_path / "two" / "progress.json").read_text())
    assert len(made["curve"]) == len(expected.curve)
    for curve, of_one in ((made["curve"], expected.curve), (made["held_out"], [*expected.held_out.values()])):
        torch.testing.assert_close(torch.tensor(curve)[:, 0], torch.tensor(of_one)[:, 0], rtol=1e-3, atol=1e-4)


def predictable() -> nn.Module:
    """A target whose next token is almost a function of the last one."""
    model = toy_target()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():  # type: ignore[union-attr]
            parameter.mul_(0.2)
    return model


def test_a_head_trained_on_what_the_target_says_drafts_it(tmp_path):
    model = predictable()
    notes: list[str] = []
    chosen = options(distil=True, epochs=30)
    train(model, TinyHead, texts(), tmp_path, chosen, note=notes.append)
    summary = json.loads((tmp_path / "training.json").read_text())
    length = summary["acceptance"]["mean_acceptance_length"]
    assert 1.3 < length <= 3  # 1 by chance
    assert f"{length:.2f} tokens a step" in notes[-1]
    fast = emssd_compile.optimize(model, TinyHead.from_pretrained(tmp_path), max_length=64, backend="eager")
    prompt = torch.tensor([[*TEXT[:8].encode()]])
    own = model.generate(  # type: ignore[operator]
        prompt, do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert fast.generate(prompt, max_new_tokens=12).tolist() == own.tolist()


@pytest.mark.parametrize(
    ("given", "what", "error", "said"),
    [
        ({"window": 1 << 20}, texts(), OptionError, "window=1048576 is more than the [0-9]+ positions"),
        ({}, Texts(["a b"], [], Characters()), InvalidInputError, "a text of 4 tokens has no window of 24"),
        ({}, Texts([TEXT], ["a b"], Characters()), InvalidInputError, "a text of 4 tokens has no window of 24"),
        ({}, Texts([TEXT], [TEXT], Characters()), InvalidInputError, "held out is also one to learn from"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(given, what, error, said, model, tmp_path, monkeypatch):
    monkeypatch.setattr("emssd_compile.training.train.FrozenTarget", None)
    with pytest.raises(error, match=said):
        train(model, TinyHead, what, tmp_path / "out", options(**given))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_held_out_are_those_given(model):
    other = "a bird flew over the old house and sang. " * 3
    windows, held_out = Texts([TEXT], [other], Characters()).windows(options())
    assert bytes(held_out.tokens.flatten().tolist()).decode() == other[: held_out.tokens.numel()]
    assert len(windows) == len(TEXT) // 24


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.kind)
def test_every_kind_is_trained_and_what_is_written_is_what_was_trained(kind, model, target, tmp_path, monkeypatch):
    """For an epoch, of its default sizes; how many drafts are accepted is another test's."""
    monkeypatch.setattr("emssd_compile.training.report.measure_acceptance", lambda *given: MEASURED)
    monkeypatch.setattr("emssd_compile.training.train.FrozenTarget", lambda *given: target)
    trained = train(model, kind, texts(), tmp_path, options(sizes={}, epochs=1, learning_rate=1e-3))
    without = [name for name, one in trained.named_parameters() if one.requires_grad and one.grad is None]
    assert not without, "several processes would wait for the gradients of these"
    with (tmp_path / "curve.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["windows"] == "train"]
    assert losses[-1] < losses[0]
    read = load_head(tmp_path)
    assert type(read) is kind
    assert read.config == trained.config
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in read.state_dict().items())


def test_a_smaller_draft_vocabulary_is_what_the_text_says_most(model, tmp_path):
    chosen = options(sizes={"draft_vocabulary": 5, "owns_head": True, "taps": (0,)}, epochs=1)
    train(model, Eagle3, texts(), tmp_path, chosen)
    most = sorted(ord(character) for character in " teah")
    assert Eagle3.from_pretrained(tmp_path).draft_ids.tolist() == most
