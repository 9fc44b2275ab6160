"""Manifests that somebody wrote: edited, with the hash that they should have."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emssd_compile.export.manifest import _dump

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    1 << 40,
    10**30,
    0.5,
    "",
    "x",
    "known",
    "state",
    "../x",
    "\x1b[2J",
    [],
    {},
]
"""What an entry is replaced by."""


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the hash that it should have: it is not damaged, but it is wrong."""
    file = artifact / "manifest.json"
    content = json.loads(file.read_bytes())
    del content["sha256"]
    change(content)
    file.write_bytes(sealed(content))


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest of this content."""
    return _dump({**content, "sha256": hashlib.sha256(_dump(content)).hexdigest()})


def rehash(artifact: Path, name: str) -> None:
    """Give a file of the artifact the size and hash that it should have in the manifest."""
    data = (artifact / name).read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(artifact, lambda content: content["files"].update({name: entry}))


def edits(content: dict[str, Any], number: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many edits of a manifest, each anywhere in it: what was done, and the content that it leads to."""
    chance = random.Random(seed)
    places = [*_places(content, ())]
    for _ in range(number):
        changed = copy.deepcopy(content)
        path = chance.choice(places)
        holder: Any = changed
        for key in path[:-1]:
            holder = holder[key]
        how = _change(holder, path[-1], chance)
        yield f"{'.'.join(map(str, path))}: {how}", changed


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The path to each entry; those that lead to many are not more likely than others."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        if path != ("explanation",):  # it is long, and nothing but what is shown
            yield from _places(item, (*path, key))


def _change(holder: Any, key: Any, chance: random.Random) -> str:
    others = [k for k in (holder if isinstance(holder, dict) else range(len(holder))) if k != key]
    how = chance.choice(["replace", "replace", "remove", "swap", "copy", "nudge"])
    if how in ("swap", "copy") and others:
        other = chance.choice(others)
        holder[key], holder[other] = holder[other], holder[other] if how == "copy" else holder[key]
        return f"{how} {other}"
    if how == "remove":
        del holder[key]
    elif how == "nudge" and type(holder[key]) is int:
        holder[key] += chance.choice([-1, 1, 64])
    else:
        holder[key] = chance.choice(VALUES)
        return f"= {holder[key]!r}"
    return how
