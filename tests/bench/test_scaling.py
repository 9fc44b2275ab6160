import json

import pytest
import torch

import emssd_compile
from bench import scaling

SIZES = [
    *("--batches", "1", "3", "--contexts", "20", "30", "--drafts", "1", "2"),
    *("--at-batch", "3", "--at-context", "20", "--at-drafts", "2", "--steps", "4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two steps are compiled, plain and with drafts, and stand for those of all models and of other K."""
    folder = tmp_path_factory.mktemp("scaling")
    files = ["--json", str(folder / "scaling.json"), "--plot", str(folder / "plots" / "scaling.png")]
    optimize, compiled = emssd_compile.optimize, {}

    def once(model, drafter, **options):
        if (drafter == "none") not in compiled:
            compiled[drafter == "none"] = optimize(model, drafter, **options)
        return compiled[drafter == "none"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emssd_compile, "optimize", once)
        patch.setattr(scaling, "memory_bandwidth", lambda *_: 1e10)
        scaling.main(["--shapes", "tiny-llama", "tiny-opt", "--backend", "eager", *SIZES, "--repeats", "1", *files])
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    return json.loads((folder / "scaling.json").read_text())


def test_one_thing_grows_at_a_time_and_other_models_are_measured_at_the_base(saved):
    places = [(row["shape"], row["batch"], row["context"], row["drafts"]) for row in saved["tables"][0]["rows"]]
    assert places == [
        *(("tiny-llama", 1, 20, k) for k in (0, 2)),
        *(("tiny-llama", 3, 20, k) for k in (0, 1, 2)),
        *(("tiny-llama", 3, 30, k) for k in (0, 2)),
        *(("tiny-opt", 3, 20, k) for k in (0, 2)),
    ]
    assert saved["base"] == {"batch": 3, "context": 20, "drafts": 2}
    assert saved["versions"]["torch"] == torch.__version__


def test_memory_is_given_for_every_model(saved):
    rows = saved["tables"][1]["rows"]
    assert [row["shape"] for row in rows] == ["tiny-llama", "tiny-opt"]
    for row in rows:
        assert row["weights"] == 4 * saved["tables"][0]["rows"][0]["parameters"]
        assert row["over_needed"] == pytest.approx(row["peak"] / (row["weights"] + row["kv"]))
        assert row["over_needed"] >= 1


def test_the_plot_is_a_png_that_shows_more_than_a_frame(folder):
    picture = (folder / "plots" / "scaling.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
