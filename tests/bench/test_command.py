import argparse
import json

import pytest
import torch

from bench import command


def parse(*arguments: str) -> argparse.Namespace:
    return command.parse(command.argument_parser("What it does.\n\nMore."), arguments)


def test_without_arguments_it_measures_float32_on_the_cpu_five_times():
    options = parse()
    assert (options.device, options.dtype, options.repeats) == (torch.device("cpu"), torch.float32, 5)
    assert options.json is None
    assert options.plot is None


def test_cuda_measures_half_precision_unless_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse("--device", "cuda").dtype is torch.float16
    assert parse("--device", "cuda", "--dtype", "bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "tpu"], "choose cpu or cuda"),
        (["--dtype", "int8"], "choose one of float32, float16, bfloat16"),
        (["--repeats", "0"], "an integer of at least 1"),
        (["--repeats", "few"], "an integer of at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_to_do(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert complaint in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse("--device", "cuda")
    assert "sees no CUDA GPU here; use --device cpu" in capsys.readouterr().err


def test_the_device_is_idle_before_and_after_timed_work(monkeypatch):
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return 10 + 0.5 * events.count("clock")

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: events.append("idle"))
    monkeypatch.setattr("time.perf_counter", clock)
    _, seconds = command.timed(lambda: events.append("work"), torch.device("cuda"))
    assert events == ["idle", "clock", "work", "idle", "clock"]
    assert seconds == 0.5


def test_a_record_says_what_was_run_on_which_machine_with_which_versions(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["whatever", "--device", "cpu", "--title", "two words"])
    path = tmp_path / "new" / "record.json"
    command.save(path, "bench.example", [{"batch": 1}], model="demo")
    record = json.loads(path.read_text())
    assert record["command"] == "python -m bench.example --device cpu --title 'two words'"
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"].startswith("3.")
    assert record["model"] == "demo"
    assert record["tables"] == [{"batch": 1}]


def test_a_figure_that_is_no_number_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        command.save(tmp_path / "record.json", "bench.example", [{"speedup": float("nan")}])


def test_what_is_not_there_is_left_out_of_a_caption():
    assert command.describe({"cpu": "EPYC", "cores": 2, "gpu": None}) == "cpu EPYC, cores 2"
