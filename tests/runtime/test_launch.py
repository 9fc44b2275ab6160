"""Steps that are captured and replayed: the same tokens, few captures, fixed addresses, nothing read too early."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.runtime.assembly import switch
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.launch import DirectLauncher, GraphLauncher, Launcher, Report, Variant, make_launcher
from emssd_compile.runtime.requests import Request
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.signature import Binding, Signature
from tests.exactness.compiled import LENGTHS, NEW_TOKENS, target
from tests.exactness.models import prompt
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

ROWS, CHUNK = 2, 24


@dataclass
class Case:
    """An engine on a played device."""

    engine: Engine
    device: TapeDevice

    def run(self, *lengths: int, most: int = NEW_TOKENS, eos: tuple[int, ...] = ()) -> list[list[int]]:
        """New tokens of the prompts of these lengths."""
        requests = [Request(index, torch.tensor(prompt(n)), most) for index, n in enumerate(lengths)]
        self.device.reports = 0
        for _ in self.engine.run(requests, eos):
            pass
        return [request.output for request in requests]


def _expected(*lengths: int, most: int = NEW_TOKENS, eos: tuple[int, ...] = ()) -> list[list[int]]:
    return [target("llama", ROWS).reference(prompt(n), most, eos) for n in lengths]


@functools.cache
def _fast(drafter: str):
    compiled = target("llama", ROWS)
    return compiled.optimize(compiled.drafter(drafter))


def _case(drafter: str = "sometimes-wrong", chunk: int = CHUNK) -> Case:
    device = TapeDevice()
    return Case(graph_engine(_fast(drafter), chunk, device), device)


@functools.cache
def _kept(drafter: str) -> Case:
    """One case for many runs: what one leaves behind must not touch the next."""
    return _case(drafter)


@pytest.mark.parametrize("drafter", ["none", "draft-model", "sometimes-wrong"])
def test_replayed_steps_give_the_tokens_of_the_reference(drafter):
    case = _kept(drafter)
    for lengths in ((5, 33, 1, 70, 17, 2, 40), (64,), (3, 7)):
        assert case.run(*lengths) == _expected(*lengths)
    assert case.device.replays > 3 * case.device.captures
    assert case.device.captures <= len(case.engine.launcher.buckets) <= 7


@settings(max_examples=10)
@given(data=st.data())
def test_any_schedule_gives_the_tokens_of_the_reference(data):
    case = _kept(data.draw(st.sampled_from(["sometimes-wrong", "draft-model"]), label="drafter"))
    lengths = data.draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=2 * ROWS), label="lengths")
    most = data.draw(st.integers(1, NEW_TOKENS), label="most")
    likely = [token for tokens in _expected(1, 17) for token in tokens[:9]]
    eos = tuple(data.draw(st.lists(st.sampled_from(likely), max_size=3, unique=True), label="eos"))
    assert case.run(*lengths, most=most, eos=eos) == _expected(*lengths, most=most, eos=eos)


def test_every_bucket_is_captured_by_the_warm_up_and_none_later():
    case = _case()
    case.engine.warmup()
    assert list(case.engine.capture()) == list(case.engine.launcher.buckets)
    assert case.device.captures == len(case.engine.launcher.buckets)
    assert case.run(5, 33, 1, 70) == _expected(5, 33, 1, 70)
    assert case.device.captures == len(case.engine.launcher.buckets)


def test_a_bucket_is_captured_when_it_is_first_needed():
    case = _case()
    assert case.run(5) == _expected(5)
    assert 0 < case.device.captures < len(case.engine.launcher.buckets)
    before = case.device.captures
    assert case.run(5) == _expected(5)
    assert case.device.captures == before


def test_chunks_of_prompts_are_not_captured():
    case = _case(chunk=512)
    largest = case.engine.launcher.buckets[-1].token_range
    captures = []
    launch = case.engine.launcher.launch

    def counted(sizes: StepSizes) -> Report:
        before = case.device.captures
        report = launch(sizes)
        captures.append((sizes.token_range, case.device.captures - before))
        return report

    case.engine.launcher.launch = counted  # type: ignore[method-assign]
    for n in (70, 64, 61):
        assert case.run(n, most=1) == _expected(n, most=1)
    assert [count for tokens, count in captures if tokens > largest] == [0, 0, 0]
    assert sum(count for _, count in captures) == case.device.captures > 0


def test_no_tensor_ever_moves():
    """A graph holds addresses."""
    case = _case("draft-model")
    places = {name: tensor.data_ptr() for name, tensor in case.engine.tensors.items()}
    case.run(5, 33, 1, 70, eos=(3,))
    case.engine.counters()
    assert {name: tensor.data_ptr() for name, tensor in case.engine.tensors.items()} == places


def test_the_counters_are_those_of_the_steps_that_ran():
    case = _case()
    case.engine.warmup()
    list(case.engine.capture())
    case.engine.counters()
    case.run(5, 17)
    counts, histogram = case.engine.counters()
    assert counts["num_emitted_tokens"] == 2 * NEW_TOKENS
    assert sum(histogram) == counts["num_spec_steps"] > 0
    assert not any(case.engine.counters()[0].values())


STEP_INPUTS = ("history", "histogram", "a", "b", "token_range", "logit_range", "draft_range", "row_range")


def _toy_step(history: Tensor, histogram: Tensor, a: Tensor, b: Tensor, *slots: Tensor) -> dict[str, Tensor]:
    """Swaps two tensors without copying them and counts in a third; reports the count and the sizes."""
    history = history + 1
    sizes = history.new_tensor([len(slot) for slot in slots])
    unused = history.new_zeros(len(REPORT_FIELDS) - 1 - len(slots))
    report = torch.cat([history.flatten()[:1], sizes, unused, a]).view(1, len(REPORT_FIELDS) + 1)
    return {"history": history, "a": b, "b": a[:], "report": report}


SIGNATURE = Signature(tuple(Binding(name, (), torch.int64, "input") for name in STEP_INPUTS), ())
TOY = Variant(_toy_step, SIGNATURE)


def _toy_tensors() -> dict[str, Tensor]:
    return {
        "history": torch.zeros(1, 1, dtype=torch.int64),
        "histogram": torch.zeros(1, dtype=torch.int64),
        "a": torch.tensor([10]),
        "b": torch.tensor([20]),
    }


def _toy_launchers() -> tuple[Launcher, Launcher]:
    return (
        DirectLauncher(TOY, _toy_tensors()),
        GraphLauncher(TOY, _toy_tensors(), TapeDevice(), (StepSizes(2, 2, 2, 2),)),
    )


@pytest.mark.parametrize("launcher", _toy_launchers(), ids=["direct", "graph"])
def test_a_result_may_be_another_input(launcher):
    for count in range(1, 6):
        (line,) = launcher.launch(StepSizes(2, 2, 2, 2)).read()
        assert line[0] == count
        assert line[-1] == (10 if count % 2 else 20)
        assert (int(launcher.tensors["a"]), int(launcher.tensors["b"])) == ((20, 10) if count % 2 else (10, 20))


@pytest.mark.parametrize("launcher", _toy_launchers(), ids=["direct", "graph"])
def test_a_report_is_that_of_its_own_step_however_late_it_is_read(launcher):
    reports = [launcher.launch(StepSizes(2, 2, 2, 2)) for _ in range(5)]
    assert [report.read()[0][0] for report in reports] == [1, 2, 3, 4, 5]


def test_sizes_are_rounded_up_only_where_they_are_captured():
    direct, graph = _toy_launchers()
    assert direct.launch(StepSizes(1, 1, 2, 1)).read()[0][1:5] == [1, 1, 2, 1]
    assert graph.launch(StepSizes(1, 1, 2, 1)).read()[0][1:5] == [2, 2, 2, 2]
    assert graph.launch(StepSizes(3, 1, 2, 1)).read()[0][1:5] == [3, 1, 2, 1]


def test_what_probes_tell_comes_with_the_report_of_its_step():
    """Of steps that are captured, too: however late it is read, and whatever runs next."""
    fast, reference = _fast("sometimes-wrong"), _fast("none")
    told = []
    for decoder in (fast, reference):
        decoder.generate([prompt(5)], max_new_tokens=1, eos_token_id=None, logprobs=True, return_dict_in_generate=True)
        device = TapeDevice()
        form = decoder._engine.variant
        engine = graph_engine(decoder, CHUNK, device) if decoder is fast else decoder._engine
        switch(engine, form)
        options = {"logprobs": True}
        requests = [Request(i, torch.tensor(prompt(n)), NEW_TOKENS, options) for i, n in enumerate((5, 33, 17))]
        for _ in engine.run(requests):
            pass
        told.append([request.reading("reading_logprobs") for request in requests])
        assert decoder is reference or device.replays > device.captures
    for found, expected in zip(*told, strict=True):
        assert found.shape == (NEW_TOKENS,)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_on_the_cpu_steps_are_called():
    assert isinstance(make_launcher(TOY, _toy_tensors(), (StepSizes(2, 2, 2, 2),)), DirectLauncher)
