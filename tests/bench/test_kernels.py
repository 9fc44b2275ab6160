import json
import sys

import pytest
import torch

from bench import kernels
from bench.kernel_cases import Case
from emssd_compile.ops._ragged_attention import reference

CPU = torch.device("cpu")
CASE = Case(rows=2, context=10, tokens=3, heads=4, kv_heads=2, head_size=8)


def test_bytes_by_hand():
    # K and V: 2 x 2 rows x 13 tokens x 2 heads x 8; queries and output: 2 x 2 rows x 3 tokens x 4 heads x 8.
    assert CASE.num_bytes(itemsize=2) == (832 + 384) * 2


def test_every_form_gets_a_time_a_share_of_the_bandwidth_and_its_error():
    for found in kernels.measure(CASE, CPU, torch.float32, bandwidth=1e10, repeats=2):
        assert found.why_not == ""
        figures = found.figures
        assert figures
        assert figures.seconds > 0
        assert figures.bytes_per_second == pytest.approx(CASE.num_bytes(4) / figures.seconds)
        assert figures.bandwidth_share == pytest.approx(figures.bytes_per_second / 1e10)
        assert figures.error < 1e-5


def test_a_wrong_kernel_shows_and_a_failing_one_says_why_and_takes_no_other_along():
    def wrong(*inputs, **options):
        return reference(*inputs, **options) * 1.01

    def failing(*inputs, **options):
        raise ValueError("something\nthis head size is not supported")

    named: dict[str, kernels.Attention | str] = {
        "wrong": wrong,
        "failing": failing,
        "missing": "no module",
        "not a number": lambda *inputs, **options: reference(*inputs, **options) * float("nan"),
        "reference": reference,
    }
    found = {m.form: m for m in kernels.measure(CASE, CPU, torch.float32, 1e10, 1, named)}
    errors = {form: measured.figures.error for form, measured in found.items() if measured.figures}
    assert errors == {"wrong": pytest.approx(0.01, rel=0.01), "reference": pytest.approx(0, abs=1e-6)}
    assert found["failing"].why_not == "ValueError: this head size is not supported"
    assert found["missing"].why_not == "no module"
    assert found["not a number"].why_not == "its output is not finite"


def test_the_reference_is_not_timed_where_its_copies_are_too_large(monkeypatch):
    monkeypatch.setattr(kernels, "_LARGEST_GATHER", 100)
    (found,) = kernels.measure(CASE, CPU, torch.float32, 1e10, 1, {"reference": reference})
    assert found.figures is None
    assert "it would copy" in found.why_not


def test_half_precision_is_compared_with_the_reference_in_float32():
    (found,) = kernels.measure(CASE, CPU, torch.float16, 1e10, 1, {"reference": reference})
    assert found.figures
    assert 1e-6 < found.figures.error < 1e-2


def test_on_cuda_every_kernel_is_there_or_its_absence_explained(monkeypatch):
    pytest.importorskip("triton")
    found = kernels.forms(torch.device("cuda"))
    assert list(found) == ["reference", "Triton", "varlen_attn"]
    assert all(callable(form) for form in found.values())
    monkeypatch.setitem(sys.modules, "emssd_compile.ops.triton.varlen", None)
    form = kernels.forms(torch.device("cuda"))["varlen_attn"]
    assert isinstance(form, str)
    assert "ModuleNotFoundError" in form


def test_the_command_saves_what_it_prints(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    kernels.main(
        ["--rows", "1", "--contexts", "16", "--tokens", "2", "--heads", "4/2/16", "--repeats", "1", "--json", str(path)]
    )
    saved = json.loads(path.read_text())
    assert saved["versions"]["torch"] == torch.__version__
    assert "cpu" in saved["hardware"]
    (table,) = saved["tables"]
    assert [row["form"] for row in table["rows"]] == ["reference", "C++"]
    printed = capsys.readouterr().out
    assert "4/2/16" in printed
    assert f"{table['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s" in printed


@pytest.mark.parametrize("heads", ["8/3/64", "8/64", "0/1/2"])
def test_impossible_heads_are_refused(heads, capsys):
    with pytest.raises(SystemExit):
        kernels.parse_arguments(["--heads", heads])
    assert "heads" in capsys.readouterr().err
