"""`folder`: an artifact is written whole or not at all, and what is loaded is what was written."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

import emssd_compile
from emssd_compile.errors import ArtifactError
from emssd_compile.export.folder import Files, read_manifest
from tests.export.crafted import rewrite
from tests.export.toy import PROMPTS, export

pytestmark = pytest.mark.usefixtures("toy_target")


def test_a_changed_byte_anywhere_is_refused(artifact):
    for file in sorted(path for path in artifact.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for place in range(0, len(data), max(len(data) // 200, 1)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ArtifactError):
                emssd_compile.load(artifact)
        file.write_bytes(data)
    emssd_compile.load(artifact)


def test_files_that_the_manifest_does_not_name_are_left_alone(artifact):
    """A repository's own, or notes."""
    (artifact / "README.md").write_text("mine")
    (artifact / "inner" / "cache").mkdir()
    emssd_compile.load(artifact).generate(PROMPTS[:1], max_new_tokens=2)
    assert (artifact / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "inner" / "step.txt").unlink(), "step.txt is missing"),
        (lambda folder: (folder / "inner" / "step.txt").write_bytes(b"to"), "has 2 bytes, .* were written"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_bytes(b'{"format": 1, "tar'), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[]"), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000), "is no manifest"),
    ],
)
def test_damage_is_named(artifact, damage, message):
    damage(artifact)
    with pytest.raises(ArtifactError, match=message):
        emssd_compile.load(artifact)


def test_no_folder_and_no_artifact_are_told_apart(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        emssd_compile.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no manifest"):
        emssd_compile.load(tmp_path)


def test_a_folder_that_holds_something_is_left_alone(fast, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists"):
        export(fast, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(fast, tmp_path):
    emssd_compile.load(export(fast, tmp_path))


def test_a_place_that_no_folder_can_take_is_refused_at_once(fast, tmp_path, monkeypatch):
    """A rename would fail in the end, when the work is done."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="the folder that this process works in"):
        export(fast, Path())
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    (tmp_path / "volume").mkdir()
    with pytest.raises(ArtifactError, match="volume is a mount point"):
        export(fast, tmp_path / "volume")
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_a_link_to_an_empty_folder_stays_a_link(fast, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(fast, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    emssd_compile.load(tmp_path / "real")


@pytest.mark.parametrize(
    ("interruption", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError, "No space left on device; nothing was left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("the builder broke"), RuntimeError, "the builder broke"),
    ],
    ids=["disk full", "interrupted", "builder broke"],
)
@pytest.mark.parametrize("moment", ["building", "sealing"])
def test_an_interrupted_export_leaves_nothing(fast, tmp_path, monkeypatch, interruption, raised, message, moment):
    def broken(path: Path) -> None:
        raise interruption

    if moment == "building":
        monkeypatch.setattr(Path, "write_text", lambda path, text: broken(path))
    else:
        monkeypatch.setattr("emssd_compile.export.folder._flush", broken)
    with pytest.raises(raised, match=message):
        export(fast, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_rename_is_flushed_too(fast, tmp_path, monkeypatch):
    """The files before it, the folder that it happens in after it."""
    flushed: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    export(fast, tmp_path / "artifact")
    assert [path.name for path in flushed[:-2]] == ["empty", "step.txt", "manifest.json"]
    assert flushed[-2].name.endswith(".partial")
    assert flushed[-1] == tmp_path


def test_an_interrupted_folder_does_not_load(fast, tmp_path, monkeypatch):
    """As after a power cut: even what could not be cleaned up is no artifact."""
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr("emssd_compile.export.manifest.Manifest.to_bytes", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(fast, tmp_path / "artifact")
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir())
    with pytest.raises(ArtifactError, match="no manifest"):
        emssd_compile.load(left)


def _outside(artifact: Path, name: str) -> Path:
    """Move a file out of the artifact, and leave a link to it."""
    moved = artifact.parent / "outside"
    (artifact / name).rename(moved)
    (artifact / name).symlink_to(moved)
    return moved


@pytest.mark.parametrize("name", ["manifest.json", "inner/step.txt", "inner"])
def test_links_are_not_followed(artifact, name):
    """Not even to what has the right hash: an artifact is what lies in its folder."""
    _outside(artifact, name)
    with pytest.raises(ArtifactError, match="is a link, or lies behind one"):
        emssd_compile.load(artifact)


def test_a_link_to_the_folder_itself_is_the_callers(artifact, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    emssd_compile.load(tmp_path / "link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos here")
@pytest.mark.parametrize("name", ["manifest.json", "inner/step.txt"])
def test_what_is_no_file_is_not_waited_for(artifact, name):
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    with pytest.raises(ArtifactError, match="is no regular file"):
        emssd_compile.load(artifact)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_a_device_is_not_read(artifact):
    for name in ("manifest.json", "inner/step.txt"):
        (artifact / name).unlink()
        (artifact / name).symlink_to("/dev/zero")
        with pytest.raises(ArtifactError, match="is a link"):
            emssd_compile.load(artifact)
        with pytest.raises(ArtifactError, match="is a link"):
            read_manifest(artifact)


def test_a_manifest_without_end_is_not_read_to_the_end(artifact):
    with (artifact / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="it is too large"):
        emssd_compile.load(artifact)


def test_what_is_opened_is_what_was_hashed(artifact):
    """Whatever is put in its place between the two, or written to it."""
    file = artifact / "inner" / "step.txt"
    content = file.read_bytes()
    with Files(artifact, read_manifest(artifact).files) as files:
        file.rename(artifact / "old")
        file.write_bytes(b"another file")
        assert files.read("inner/step.txt") == bytes(files.map("inner/step.txt")) == content
        if sys.platform == "linux":
            assert files.path("inner/step.txt").read_bytes() == content
        (artifact / "old").write_bytes(content[::-1])
        with pytest.raises(ArtifactError, match=r"step.txt is not what was written"):
            files.read("inner/step.txt")
        with pytest.raises(ArtifactError, match=r"has no README\.md among the files of its manifest"):
            files.read("README.md")


@pytest.mark.parametrize(
    "name", ["", ".", "/etc/passwd", "../x", "inner/../empty", "./empty", "inner//step.txt", "a\0b"]
)
def test_a_file_has_one_name_inside_the_folder(artifact, name):
    rewrite(artifact, lambda content: content["files"].update({name: content["files"]["empty"]}))
    with pytest.raises(ArtifactError, match="files cannot be read"):
        emssd_compile.load(artifact)
