"""How much memory can be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device: without swapping, and within the limits of the process's cgroups."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return max(0, min(_available(), *_left_by_cgroups()))


def _available() -> int:
    """What the kernel takes to be available, file caches that it can give up included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_cgroups() -> Iterator[int]:
    """What each cgroup that limits this process's memory has left, v1 and v2; at least one number."""
    yield 1 << 62  # none limits it
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2: one tree for all
            yield from _left(_CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _left(_CGROUPS / "memory", path, *names)


def _left(root: Path, path: str, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """What a cgroup and those around it have left; in a container the outer ones are not to be seen."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            most = int((group / limit).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield most - int((group / used).read_text()) + int(stat.get(reclaimable, 0))
        except (OSError, ValueError):  # there is no such group here, or it has no limit
            pass
        if group == root:
            return
