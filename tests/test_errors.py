"""Errors say what was wrong, where, and what to do; one base class catches all of them."""

import pytest

from emssd_compile import errors
from emssd_compile.errors import EmssdError, InvalidInputError, OptionError, UnsupportedModelError


@pytest.mark.parametrize("name", [n for n, v in vars(errors).items() if isinstance(v, type)])
def test_every_error_is_caught_by_the_base_class(name):
    assert issubclass(getattr(errors, name), EmssdError)


@pytest.mark.parametrize("error", [InvalidInputError, OptionError])
def test_wrong_values_are_value_errors(error):
    assert issubclass(error, ValueError)


def test_a_refused_model_says_where_and_what_to_do():
    error = UnsupportedModelError(
        "tokens are mixed", node="cumsum", op="aten.cumsum.default", module="layers.0", remedy="use another model"
    )
    assert str(error) == (
        "tokens are mixed (at node 'cumsum', op 'aten.cumsum.default', module 'layers.0')\n"
        "  What to do: use another model"
    )
    assert (error.reason, error.node, error.op) == ("tokens are mixed", "cumsum", "aten.cumsum.default")
    assert (error.module, error.remedy) == ("layers.0", "use another model")


def test_what_is_not_known_is_left_out():
    assert str(UnsupportedModelError("no attention")) == "no attention"
    assert str(UnsupportedModelError("no attention", op="relu")) == "no attention (at op 'relu')"
