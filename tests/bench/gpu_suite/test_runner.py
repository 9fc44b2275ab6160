import json
import os
import time
from pathlib import Path

import pytest

from bench.gpu_suite import __main__ as suite
from bench.gpu_suite import runner
from bench.gpu_suite.parts import PARTS, Part

TIMEIT = ("timeit", "-n", "1", "-r", "1")
PASSING = Part("passing", (*TIMEIT, "pass"), 20, writes_json=False)
FAILING = Part("failing", (*TIMEIT, "1/0"), 20, writes_json=False)


def test_a_failing_part_is_recorded_with_its_tracebacks_end_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.json"
    monkeypatch.setitem(PARTS, True, lambda device: [PASSING, FAILING, PASSING])
    assert suite.main(["--smoke", "--json", str(path)]) == 1
    saved = json.loads(path.read_text())
    assert [part["status"] for part in saved["parts"]] == ["passed", "failed", "passed"]
    assert saved["parts"][1]["output_tail"][-1] == "ZeroDivisionError: division by zero"
    assert saved["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "failing: failed" in printed
    assert "division by zero" in printed


def test_the_record_is_written_after_each_part(tmp_path, monkeypatch):
    path = tmp_path / "suite.json"
    lengths = []

    def watched(parts, limit):
        for outcome in runner.run_all(parts, limit):
            lengths.append(len(json.loads(path.read_text())["parts"]) if path.exists() else 0)
            yield outcome

    monkeypatch.setitem(PARTS, True, lambda device: [PASSING, PASSING])
    monkeypatch.setattr(suite, "run_all", watched)
    assert suite.main(["--smoke", "--json", str(path)]) == 0
    assert lengths == [0, 1]


def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path):
    mark = tmp_path / "pid"
    hang = (
        "import os, pathlib, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid)); print('began', flush=True); time.sleep(60)"
    )
    outcome = runner.run(Part("hanging", (*TIMEIT, hang), 60, writes_json=False), 3)
    assert outcome.status == "timed out"
    assert outcome.output_tail == ["began"]
    child = int(mark.read_text())
    for _ in range(50):
        if not _alive(child):
            return
        time.sleep(0.1)
    pytest.fail("the child of the part is still there")


def _alive(pid):
    """A child that nobody waited for lingers as a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_parts_that_the_time_does_not_suffice_for_are_not_started_and_fail_the_suite():
    (outcome,) = runner.run_all([PASSING], limit_seconds=0)
    assert outcome.status == "not started"
    assert not outcome.good


@pytest.mark.parametrize(("code", "status"), [("0", "passed"), ("5", "failed")])
def test_exit_codes(code, status):
    part = Part("part", (*TIMEIT, f"import os; os._exit({code})"), 20, writes_json=False)
    outcome = runner.run(part, 20)
    assert outcome.status == status
    assert outcome.good == (status != "failed")


def test_what_a_part_says_it_skipped_and_what_it_wrote_are_kept():
    outcome = runner.run(Part("artifacts", ("bench.gpu_suite.artifacts", "--target", "tensorrt"), 60), 60)
    assert outcome.record
    assert outcome.record["hardware"]
    assert outcome.status == ("skipped" if "skipped" in outcome.record else "passed")


def test_a_record_that_was_cut_off_does_not_stop_the_suite(tmp_path):
    path = tmp_path / "record.json"
    assert runner._read(path) is None
    path.write_text('{"tables": [')
    assert runner._read(path) is None
