import pytest
import torch

from emssd_compile.errors import CheckpointError
from emssd_compile.training import continuations
from emssd_compile.training.continuations import Continuations
from emssd_compile.training.data import Windows, encode
from emssd_compile.training.processes import accelerator
from tests.training.toys import TEXT, WINDOW, Characters, options

PROMPT = 8


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows.cut(encode([TEXT], Characters(), 6 * WINDOW), WINDOW)


def make(model, folder, **given) -> Continuations:
    return Continuations(model, folder, options(distil=True, **given), accelerator(), shows=False)


def test_they_are_the_models_own_and_made_once(model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(continuations, "_SHARD", 4)
    made = make(model, tmp_path).of(windows, "training")
    stream, counts = [], []
    for row in windows.tokens:
        own = model.generate(row[None, :PROMPT], do_sample=False, max_new_tokens=WINDOW - PROMPT, pad_token_id=0)[0]
        stream.append(own)
        counts.append(torch.arange(len(own)) >= PROMPT)
    expected = Windows.cut(torch.cat(stream), WINDOW, torch.cat(counts))
    assert made.tokens.equal(expected.tokens)
    assert made.counts.equal(expected.counts)

    # a run that is started again makes only what is missing
    monkeypatch.setattr(continuations, "optimize", None)
    assert make(model, tmp_path).of(windows, "training").tokens.equal(made.tokens)
    sorted(tmp_path.iterdir())[-1].unlink()
    with pytest.raises(TypeError):
        make(model, tmp_path).of(windows, "training")


def test_sampled_ones_do_not_depend_on_which_are_made_together(model, windows, tmp_path, monkeypatch):
    sampled = []
    for shard in (64, 5):
        monkeypatch.setattr(continuations, "_SHARD", shard)
        (tmp_path / str(shard)).mkdir()
        sampled.append(make(model, tmp_path / str(shard), temperature=1.0).of(windows, "training").tokens)
    assert sampled[0].equal(sampled[1])


def test_a_damaged_file_is_named(model, windows, tmp_path):
    (tmp_path / "training-000000000.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"training-000000000\.safetensors cannot be read"):
        make(model, tmp_path).of(windows, "training")
