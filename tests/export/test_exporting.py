"""`exporting`: what cannot be done is said before any work, and an artifact is checked before it is finished."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from emssd_compile.errors import ArtifactError, OptionError
from emssd_compile.runtime.assembly import assemble
from emssd_compile.runtime.engine import Engine
from tests.export import toy
from tests.export.toy import export

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


def test_an_artifact_that_decodes_other_tokens_is_not_finished(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "distort", lambda results: {**results, "history": results["history"].flip(0)})
    with pytest.raises(ArtifactError, match="decodes other tokens"):
        export(fast, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())
    fast._export("toy", tmp_path / "artifact", False, False, False)
