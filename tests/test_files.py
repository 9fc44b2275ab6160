"""`files`: what is read back later is whole."""

from __future__ import annotations

import os

import pytest

from emssd_compile.files import write_whole


def test_a_file_that_cannot_be_finished_is_not_begun(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_whole(file, b"first")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(file, b"second")
    assert file.read_bytes() == b"first"
    assert [*tmp_path.iterdir()] == [file]
