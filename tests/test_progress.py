"""Progress is shown on standard error: standard output is for results."""

import pytest

from emssd_compile.progress import progress_bar, working


@pytest.mark.parametrize("shown", [True, False])
def test_bars_and_spinners_write_to_standard_error(shown, capfd):
    with progress_bar(shown, 3, "rows") as advance:
        advance(3)
    with working("thinking", shown=shown):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert ("rows" in err and "3/3" in err and "thinking" in err) == shown
