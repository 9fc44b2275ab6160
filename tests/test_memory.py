"""`memory`: what is available, whoever sets the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emssd_compile import memory
from emssd_compile.errors import CapacityError
from emssd_compile.runtime.memory import allocate, check_room
from emssd_compile.step.tensor_spec import TensorSpec

CPU = torch.device("cpu")


def test_what_is_available_is_less_than_what_there_is():
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available_memory(CPU) < total


def _group(folder: Path, limit: str, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")


def test_the_tightest_limit_of_all_groups_counts(tmp_path):
    _group(tmp_path, "max", 0, 0)
    _group(tmp_path / "outer", "1000", 400, 100)
    _group(tmp_path / "outer" / "inner", "9000", 400, 0)
    names = "memory.max", "memory.current", "inactive_file"
    assert [*memory._left(tmp_path, "/outer/inner", *names)] == [8600, 700]
    assert [*memory._left(tmp_path, "/elsewhere", *names)] == [], "groups of the host cannot be seen in a container"


def test_caches_that_exceed_what_is_available_are_refused(monkeypatch):
    """Memory that others hold is not to be had, however much there is in all."""
    monkeypatch.setattr(memory, "_left_by_cgroups", lambda: iter([1000]))
    allocate({"k_cache_0": TensorSpec((10, 25), torch.float32)}, CPU)
    with pytest.raises(CapacityError, match=r"^the KV caches need .*smaller max_length or max_batch$"):
        allocate({"k_cache_0": TensorSpec((10, 26), torch.float32)}, CPU)


@pytest.mark.parametrize(
    ("prefix", "owner"), [("drafter", "the drafter"), ("rule", "the acceptance rule"), ("policy", "the length policy")]
)
def test_what_a_part_keeps_is_called_the_parts(monkeypatch, prefix, owner):
    monkeypatch.setattr(memory, "_left_by_cgroups", lambda: iter([1 << 20]))
    specs = {
        "k_cache_0": TensorSpec((1,), torch.float32),
        f"{prefix}_seen": TensorSpec((2,), torch.int64),
        f"{prefix}_table": TensorSpec((2, 1 << 30), torch.int64),
    }
    expected = (
        rf"^{owner}'s own tensors need 16\.0 GiB, most of it for 'table' \[2, 1073741824\]; cpu has .* keep less$"
    )
    with pytest.raises(CapacityError, match=expected):
        check_room(specs, CPU)
