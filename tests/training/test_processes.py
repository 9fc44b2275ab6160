"""Launched in other ways than as one process: what launchers are told that the command says itself is refused."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from emssd_compile.errors import OptionError
from emssd_compile.training import processes
from emssd_compile.training.processes import accelerator, launched


@pytest.fixture
def afresh():
    """As in a process in which nothing was launched yet."""
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    yield
    for state, shared in zip(states, before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(shared)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "launched with --mixed_precision bf16: leave it out, and pass --dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "--dynamo_backend: leave it out"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps: leave it out, and pass"),
    ],
)
def test_what_the_command_says_itself_is_not_for_the_launcher(name, value, said, afresh, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=said):
        accelerator()


def test_processes_that_do_not_find_one_another_do_not_train_alone(afresh, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 processes were launched, and this one is one of 1"):
        accelerator()  # on a CPU, and not told so


def test_a_head_is_not_cut_up(afresh, monkeypatch):
    monkeypatch.setattr(processes, "_KNOWN", ())
    with pytest.raises(OptionError, match="a head is trained whole in each process, not by NO"):
        accelerator()


def test_one_process_computes_where_it_is_told_to():
    with launched("cpu") as (alone, device):
        assert (alone.num_processes, alone.is_main_process, device) == (1, True, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu7", "--device gpu7 cannot be used: .*pass cpu"),
        ("cuda:99", "--device cuda:99 cannot be used: .*pass cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, said):
    with pytest.raises(OptionError, match=said), launched(name):
        pass


def test_several_processes_have_a_device_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(OptionError, match="--device cpu:0: each of 2 processes has a device of its own; pass cpu"),
        launched("cpu:0"),
    ):
        pass
