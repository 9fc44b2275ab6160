"""`exporting`: what cannot be done is said before any work, and an artifact is checked before it is finished."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

import emssd_compile
from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.engine import Engine
from tests.export import toy
from tests.export.toy import PROMPTS, export

pytestmark = pytest.mark.usefixtures("toy_target")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"colour": 1}, r"unknown options \['colour'\]; toy knows \['label'\]"), ({"label": ""}, "label is empty")],
)
def test_options_are_refused_before_any_work(fast, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("emssd_compile.exporting.apply_target_passes", None)
    with pytest.raises(OptionError, match=message):
        export(fast, tmp_path / "artifact", **options)


@pytest.mark.parametrize(("verify_only", "check"), [(False, True), (False, False), (True, True)])
def test_what_is_missing_is_found_before_any_work_and_only_if_it_is_needed(
    fast, tmp_path, monkeypatch, verify_only, check
):
    asked: list[bool] = []
    monkeypatch.setattr(toy, "require", lambda options, device, runs: asked.append(runs))
    fast._export("toy", tmp_path / "artifact", verify_only, check, False)
    assert asked == [check and not verify_only]

    def missing(*asked: object) -> None:
        raise ArtifactError("no toy shop")

    monkeypatch.setattr(toy, "require", missing)
    monkeypatch.setattr("emssd_compile.exporting.apply_target_passes", None)
    with pytest.raises(ArtifactError, match="no toy shop"):
        fast._export("toy", tmp_path / "other", verify_only, check, False)


def test_the_check_holds_one_set_of_caches_at_a_time(fast, tmp_path, monkeypatch):
    """Without waiting for the garbage collector."""
    made: list[weakref.ref[Engine]] = []

    def assembled(*args: Any, **options: Any) -> Engine:
        assert not any(engine() for engine in made)
        engine = assemble(*args, **options)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr("emssd_compile.exporting.assemble", assembled)
    gc.disable()
    try:
        export(fast, tmp_path / "artifact")
    finally:
        gc.enable()
    assert len(made) == 2


def test_each_stage_is_told_when_it_is_done(fast, tmp_path, capfd):
    fast._export("toy", tmp_path / "artifact", False, True, True)
    out, err = capfd.readouterr()
    assert (out, "exporting to toy: 4/4" in err) == ("", True)


def test_an_artifact_that_decodes_other_tokens_is_not_finished(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "distort", lambda results: {**results, "history": results["history"].flip(0)})
    with pytest.raises(ArtifactError, match="decodes other tokens"):
        export(fast, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())
    fast._export("toy", tmp_path / "artifact", False, False, False)


def test_an_artifact_honours_what_is_asked_for_and_what_the_model_itself_sets(fast, tmp_path, monkeypatch):
    plain = emssd_compile.load(export(fast, tmp_path / "plain"))
    assert plain.row_options.keys() == {"min_new_tokens"}
    with pytest.raises(NotImplementedError, match="do_sample=True is not supported"):
        plain.generate([[1]], max_new_tokens=2, do_sample=True)
    config = SimpleNamespace(repetition_penalty=1.1, sequence_bias={(1, 2): -0.5}, bad_words_ids=[], logit_bias={3: 1})
    monkeypatch.setattr(type(fast), "generation_config", config)
    names = ["repetition_penalty", "sequence_bias", "logit_bias"]
    own = emssd_compile.load(export(fast, tmp_path / "own"))
    assert own.row_options.keys() == {"min_new_tokens", *names}
    asked = emssd_compile.load(export(fast, tmp_path / "asked", row_options=[*names, "presence_penalty"]))
    assert asked.row_options.keys() == {*names, "presence_penalty", "frequency_penalty"}
    assert asked.row_options.items() <= fast.row_options.items()
    rows = own.generate(PROMPTS, max_new_tokens=6)
    assert asked.generate(PROMPTS, max_new_tokens=6) == rows
    assert rows == fast.generate(PROMPTS, max_new_tokens=6), "what the model's config set comes along"
    config.logit_bias = {10**6: 1}
    with pytest.raises(OptionError, match="logit_bias: 1000000 is no id of the vocabulary"):
        export(fast, tmp_path / "nonsense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_options": ["colour"]}, "row_options: there is no 'colour'; choose from bad_words_ids, "),
        ({"row_options": "repetition_penalty"}, "row_options='repetition_penalty' is no list of names"),
        ({"row_options": 3}, "row_options=3 is no list of names"),
    ],
)
def test_row_options_that_cannot_be_meant_are_refused_before_any_work(fast, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        export(fast, tmp_path / "artifact", **options)
    assert not (tmp_path / "artifact").exists()
