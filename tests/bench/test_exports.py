import json

from bench import exports


def test_a_row_says_what_was_built_whether_it_ran_and_whether_its_tokens_are_right(tmp_path):
    path = tmp_path / "exports.json"
    what = ["--models", "tiny-gpt2", "--drafters", "none", "--targets", "onnx", "--batch", "2"]
    quick = ["--tokens", "4", "--repeats", "1", "--least-seconds", "0"]
    assert exports.main([*what, *quick, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    (row,) = record["tables"][0]["rows"]
    assert (row["target"], row["model"], row["drafter"]) == ("onnx", "tiny-gpt2", "none")
    assert (row["run"], row["identical"]) == ("yes", True)
    assert min(row["built"], row["megabytes"], row["step_ratio"]) > 0
    assert (record["batch"], record["tokens"], record["least_seconds"]) == (2, 4, 0)
