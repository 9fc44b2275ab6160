"""What a request says of the choice of tokens, and what it leaves to the model."""

from types import SimpleNamespace
from typing import Any

import pytest

from emssd_compile.serve.sampling import row_options
from emssd_compile.serve.schemas import CompletionBody

OPEN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.mark.parametrize(
    ("fields", "stored", "expected"),
    [
        ({}, {}, OPEN),
        ({}, {"do_sample": False, "temperature": 0.6, "top_k": 20}, OPEN | {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 1, "top_k": 0}, {"temperature": 0.6, "top_k": 20}, OPEN),
        ({"top_k": -1, "min_p": 0.1}, {"top_k": 20}, OPEN | {"min_p": 0.1}),
        ({"temperature": 0, "top_p": 0.5}, {}, {"do_sample": False}),
        ({}, {"temperature": 0}, {"do_sample": False}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 2}, OPEN | {"repetition_penalty": 1.0}),
        ({"logit_bias": {"07": 1}}, {}, OPEN | {"logit_bias": {7: 1.0}}),
    ],
)
def test_a_request_goes_before_the_model_and_that_before_openai(fields: Any, stored: Any, expected: Any) -> None:
    body = CompletionBody(model="m", prompt="x", **fields)
    assert row_options(body, SimpleNamespace(**stored)) == expected


def test_an_artifact_is_not_told_to_leave_what_it_cannot_do() -> None:
    known = ["do_sample", "temperature"]
    asked = CompletionBody(model="m", prompt="x", top_p=1.0)
    assert row_options(asked, None, known) == {"do_sample": True, "temperature": 1.0}
    asked = CompletionBody(model="m", prompt="x", top_p=0.5)
    assert row_options(asked, None, known) == {"do_sample": True, "temperature": 1.0, "top_p": 0.5}, "it is refused"


def test_a_model_without_a_configuration_is_openai_s() -> None:
    assert row_options(CompletionBody(model="m", prompt="x"), None) == OPEN
