"""Progress is shown on standard error, wherever that goes: standard output is for results."""

import sys
from types import SimpleNamespace

import pytest
import rich.console

from emssd_compile import progress
from emssd_compile.progress import progress_bar, working


@pytest.fixture(params=["terminal", "file", "notebook"])
def _place(request, monkeypatch):
    """Where standard error goes."""
    if request.param == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any file for a terminal then
    if request.param == "notebook":
        monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
        monkeypatch.setitem(sys.modules, "ipywidgets", None)


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize("shown", [True, False])
def test_it_is_written_to_standard_error(shown, capfd):
    with progress_bar(shown, 3, "rows") as advance:
        advance(3)
    with working("thinking", shown=shown):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert ("rows" in err and "3/3" in err and "thinking" in err) == shown


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress_bar(True, 50, "rows") as advance:
        for _ in range(50):
            now[0] += 0.5
            advance(1)
    assert capfd.readouterr().err == "rows: 20/50 in 10 s\nrows: 40/50 in 20 s\nrows: 50/50 in 25 s\n"


def test_work_whose_end_is_not_known_is_told_when_it_begins(capfd):
    with working("thinking", shown=True):
        assert capfd.readouterr().err == "thinking ...\n"


def test_nothing_is_said_to_be_done_that_broke_off(capfd):
    with pytest.raises(KeyError), progress_bar(True, 50, "rows"):
        raise KeyError
    assert capfd.readouterr().err == ""
