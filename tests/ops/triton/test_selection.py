import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emssd_compile.ops.triton.selection import Call, Selection, agrees, standard_forms

RESULT = torch.linspace(-1, 1, 50).bfloat16()


class Clock:
    """Says how long a form takes; may be stopped."""

    def __init__(self, times: dict[Call, float]) -> None:
        self.times = times
        self.runs = True
        self.read = 0

    def measure(self, call: Call) -> float:
        self.read += 1
        return self.times[call]


def form(result: Tensor = RESULT) -> Callable[[], Tensor]:
    return lambda: result.clone()


@pytest.mark.parametrize(("first", "second", "fastest"), [(2.0, 1.0, "second"), (1.0, 2.0, "first")])
def test_the_fastest_form_is_measured_once_and_remembered(first: float, second: float, fastest: str) -> None:
    forms = {"first": form(), "second": form()}
    clock = Clock(dict(zip(forms.values(), (first, second), strict=True)))
    selection = Selection(clock.measure, lambda: True)
    for _ in range(3):
        assert torch.equal(selection.run("class", forms), RESULT)
    assert selection.chosen == {"class": fastest}
    assert clock.read == 2
    selection.run("another class", forms)
    assert clock.read == 4


def test_nothing_is_measured_while_a_graph_is_captured() -> None:
    ran: list[str] = []

    def named(name: str) -> Tensor:
        ran.append(name)
        return RESULT

    forms: dict[str, Call] = {name: functools.partial(named, name) for name in ("first", "second")}
    clock = Clock({forms["first"]: 2.0, forms["second"]: 1.0})
    selection = Selection(clock.measure, lambda: clock.runs)
    clock.runs = False
    selection.run("class", forms)
    assert ran == ["first"]
    assert selection.chosen == {}
    clock.runs = True
    selection.run("class", forms)
    clock.runs = False
    ran.clear()
    selection.run("class", forms)
    assert ran == ["second"]  # what is remembered may be used


def test_a_form_with_another_result_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    forms = {"right": form(), "wrong": form(RESULT + (torch.arange(50) == 7))}
    clock = Clock({forms["right"]: 2.0, forms["wrong"]: 1.0})
    selection = Selection(clock.measure, lambda: True)
    assert torch.equal(selection.run("class", forms), RESULT)
    assert selection.chosen == {"class": "right"}
    assert "wrong is not used for class" in caplog.text


def test_a_form_that_fails_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Tensor:
        raise RuntimeError("no kernel for this device")

    forms = {"works": form(), "fails": fail}
    selection = Selection(lambda call: 1.0, lambda: True)
    assert torch.equal(selection.run("class", forms), RESULT)
    assert "fails is not used for class: no kernel for this device" in caplog.text


def test_a_single_form_is_not_measured() -> None:
    selection = Selection(lambda call: pytest.fail("measured"), lambda: True)
    assert torch.equal(selection.run("class", {"only": form()}), RESULT)


def test_agreement_is_up_to_rounding() -> None:
    exact = torch.randn(1000)
    assert agrees(exact.bfloat16(), (exact * (1 + 2**-8)).bfloat16())
    assert not agrees((exact + 0.2).bfloat16(), exact.bfloat16())


def test_within_standard_forms_no_clock_chooses_though_another_form_was_faster() -> None:
    forms = {"first": form(), "second": form(-RESULT)}
    clock = Clock(dict(zip(forms.values(), (2.0, 1.0), strict=True)))
    selection = Selection(clock.measure, lambda: True)
    selection._chosen["class"] = "second"
    with standard_forms():
        for key in ("class", "another class"):
            assert torch.equal(selection.run(key, forms), RESULT)
    assert torch.equal(selection.run("class", forms), -RESULT)
    assert clock.read == 0
