"""`RecurrentDrafter`: which checkpoints, targets and options it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emssd_compile.drafters import RecurrentDrafter, load_head
from emssd_compile.drafters.recurrent import RecurrentConfig
from emssd_compile.errors import CheckpointError, DrafterError, OptionError
from emssd_compile.step.drafting import TokenTables
from tests.drafters.contexts import target_of

APPLE = {
    "model_type": "recurrent_drafting_drafter",
    "vocab_size": 32,
    "hidden_size": 16,
    "exit_dim": 24,
    "num_draft_layers": 1,
    "rnn": True,
}


def _weights(**changed: Tensor | None) -> dict[str, Tensor]:
    """Those of a checkpoint with the config `APPLE`; None leaves a tensor out."""
    shapes = {
        "input_proj.weight": (24, 32),
        "input_proj.bias": (24,),
        "lm_head.0.linear.weight": (24, 24),
        "lm_head.0.linear.bias": (24,),
        "lm_head.1.weight": (32, 24),
        "rnn_u.weight": (16, 16),
        "rnn_u.bias": (16,),
        "rnn_w.weight": (16, 16),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()} | changed
    return {name: value for name, value in weights.items() if value is not None}


def _write(folder: Any, config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_checkpoint_of_apples_is_read_and_written(tmp_path):
    weights = _weights()
    head = RecurrentDrafter.from_pretrained(_write(tmp_path, APPLE, weights), width=2, length=3)
    assert head.config == RecurrentConfig(16, 32, exit_size=24, num_layers=1)
    assert (head.num_draft_tokens, head.max_depth) == (6, 3)
    head.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again/model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "again/config.json").read_text()).items() >= APPLE.items()


def test_a_head_whose_state_is_a_sum_is_what_a_checkpoint_that_does_not_say_holds(tmp_path):
    config = {name: value for name, value in APPLE.items() if name != "rnn"}
    weights = {name: value for name, value in _weights().items() if not name.startswith("rnn")}
    head = load_head(_write(tmp_path, config, weights))
    assert isinstance(head, RecurrentDrafter)
    assert not head.config.rnn


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"model_type": "llama"}, {}, "no checkpoint of a RecurrentDrafter; these layouts are read: ml-recurrent"),
        ({"exit_dim": None}, {}, "exit_dim is missing"),
        ({"num_draft_layers": -1}, {}, "config.json: RecurrentConfig num_layers=-1 is out of range"),
        ({"rnn": "yes"}, {}, "rnn is 'yes'; it is to be of type bool"),
        ({}, {"rnn_w.weight": None}, r"lacks 1 tensors .*rnn_w.weight"),
        ({}, {"rnn_w.bias": torch.zeros(16)}, r"holds 1 tensors that .*rnn_w.bias"),
        ({}, {"lm_head.1.weight": torch.zeros(32, 16)}, r"lm_head.1.weight is \[32, 16\]; expected \[32, 24\]"),
        ({"rnn": False}, {}, r"holds 3 tensors that .*rnn_u.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, config, weights, message):
    folder = _write(tmp_path, {**APPLE, **config}, _weights(**weights))
    with pytest.raises(CheckpointError, match=message):
        RecurrentDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("hidden", "table", "vocabulary", "message"),
    [
        (8, (32, 8), 32, "made for hidden states of size 16; the target's have 8"),
        (16, (32, 8), 32, "reads embeddings of the size of hidden states, 16; the target's are of size 8"),
        (16, (4000, 16), 4000, "predicts 32 tokens and the target 4000"),
        (16, None, 32, "reads the target's embedding, and the target has none"),
        (16, (32, 16), 32, "drafts 33 tokens behind the root, and there are only 32 in the vocabulary"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(hidden, table, vocabulary, message):
    tables = TokenTables(embedding=None if table is None else torch.zeros(table))
    with pytest.raises(DrafterError, match=message):
        RecurrentDrafter(RecurrentConfig(16, 32), width=33).prepare(target_of(None, 1, 8, vocabulary, hidden, tables))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "RecurrentDrafter width=0 is out of range"),
        ({"length": 0}, "RecurrentDrafter length=0 is out of range"),
        ({"length": 2.5}, "RecurrentDrafter length=2.5 is not an integer"),
        ({"width": 200, "length": 3}, "RecurrentDrafter length=3 is out of range; pass at most 2"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        RecurrentDrafter(RecurrentConfig(16, 32), **options)


@pytest.mark.parametrize("sizes", [{"hidden_size": 0}, {"vocabulary": 0}, {"exit_size": -1}, {"rnn": 1}])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(OptionError, match=f"RecurrentConfig {next(iter(sizes))}="):
        RecurrentConfig(**{"hidden_size": 16, "vocabulary": 32, **sizes})
