"""What the bindings of an artifact must be: those that the host drives, and those that the graph itself has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch

from emssd_compile.errors import OptionError
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.options import RowOption
from emssd_compile.step.probe import READING, ReadingSpec
from emssd_compile.step.readers import can_read
from emssd_compile.step.signature import ROLES, SIZE_NAMES, Binding, Signature, role_of_state
from emssd_compile.step.state import StepState

KEY = "emssd_compile.signature"
"""Under this name an ONNX model and a package of AOTInductor hold the text of their signature."""

_MOST = 1 << 31  # of one size
_READING: dict[str, type] = {"asked_by": str, "is_cut": bool, "of_steps": bool}  # beside shape and dtype


def entry(binding: Binding) -> dict[str, Any]:
    """A binding as what JSON knows."""
    dtype = str(binding.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"name": binding.name, "shape": list(binding.shape), "dtype": dtype, "role": binding.role}
    option = binding.option
    if option is not None:
        content = {f.name: getattr(option, f.name) for f in fields(option) if f.name != "dtype"}
        found["option"] = {**content, "shape": list(option.shape)}
    if binding.reading is not None:
        found["reading"] = {name: getattr(binding.reading, name) for name in _READING}
    return found


def from_entry(content: dict[str, Any]) -> Binding:
    """Back from `entry`, which `is_entry`."""
    dtype, option, told = getattr(torch, content["dtype"]), content.get("option"), content.get("reading")
    found = None if option is None else RowOption(dtype=dtype, **{**option, "shape": tuple(option["shape"])})
    reading = None if told is None else ReadingSpec(tuple(content["shape"][2:]), dtype, **told)
    return Binding(content["name"], tuple(content["shape"]), dtype, content["role"], found, reading)


def is_entry(content: dict[str, Any]) -> bool:
    """Whether this is a binding, by its types and ranges."""
    return (
        content.keys() - {"option", "reading"} == {"name", "shape", "dtype", "role"}
        and all(isinstance(content[name], str) for name in ("name", "dtype", "role"))
        and isinstance(getattr(torch, content["dtype"], None), torch.dtype)
        and content["role"] in ROLES
        and isinstance(content["shape"], list)
        and all(isinstance(size, str) or (type(size) is int and 0 <= size < _MOST) for size in content["shape"])
        and (content["role"] == "option") == ("option" in content)
        and ("option" not in content or _is_option(content["option"], content["shape"], content["dtype"]))
        and (content["role"] == "reading") == ("reading" in content)
        and ("reading" not in content or _is_reading(content["reading"], content["shape"]))
    )


def _is_option(content: object, shape: list[int | str], dtype: str) -> bool:
    """Whether this is what a request may set, kept in a tensor of this shape and dtype."""
    if not isinstance(content, dict) or content.keys() != {f.name for f in fields(RowOption)} - {"dtype"}:
        return False
    numbers = {name: value for name, value in content.items() if name not in ("needs", "reader", "shape")}
    if not all(value is None or type(value) in (bool, int, float) for value in numbers.values()):
        return False
    if not isinstance(content["needs"], str) or content["shape"] != shape[1:]:
        return False
    if not can_read(content["reader"], tuple(content["shape"])):
        return False
    try:
        RowOption(dtype=getattr(torch, dtype), **numbers).check("default", content["default"])
    except (OptionError, KeyError, TypeError):
        return False
    return True


def _is_reading(content: object, shape: list[int | str]) -> bool:
    """Whether this is what probes tell of each token, in a tensor of this shape."""
    return (
        isinstance(content, dict)
        and {name: type(value) for name, value in content.items()} == _READING
        and len(shape) >= (3 if content["is_cut"] else 2)
        and all(type(size) is int for size in shape)
    )


def text(signature: Signature) -> str:
    """A signature as text: two signatures are the same if their texts are."""
    return json.dumps([[entry(binding) for binding in part] for part in (signature.inputs, signature.results)])


def flaws(signature: Signature, kind: str) -> list[str]:
    """What keeps a host from driving a graph of these bindings; nothing if it can.

    Args:
        signature: the bindings.
        kind: `"step"` or `"verify"`, as in `Manifest`.
    """
    counts = [Counter(binding.name for binding in part) for part in (signature.inputs, signature.results)]
    twice = sorted(name for count in counts for name, number in count.items() if number > 1)
    if twice:
        return [f"{', '.join(twice)} stands twice"]
    fixed = [b for b in signature.inputs if b.role not in ("size", "input")]
    open_ended = [b.name for b in fixed if any(isinstance(size, str) for size in b.shape)]
    if open_ended:
        return [f"{', '.join(open_ended)} has no fixed shape"]
    known = {size for b in signature.inputs for size in b.shape if isinstance(size, str)}
    unknown = [b.name for b in signature.results for size in b.shape if isinstance(size, str) and size not in known]
    if unknown:
        return [f"the shape of {', '.join(unknown)} is not that of an input"]
    return _flaws_of_step(signature) if kind == "step" else _flaws_of_graph(signature)


def _flaws_of_graph(signature: Signature) -> list[str]:
    allowed = (signature.inputs, ("size", "input", "cache")), (signature.results, ("result",))
    return [
        f"{b.name} is a {b.role}, which a graph has none of"
        for part, roles in allowed
        for b in part
        if b.role not in roles
    ]


def _flaws_of_step(signature: Signature) -> list[str]:
    """Compare with the state that the host makes, and with what each role promises."""
    inputs = {binding.name: binding for binding in signature.inputs}
    dims = {"history": 2, "is_eos": 1, "draft_tokens": 2, "histogram": 1}
    own = {b.name: b for b in signature.inputs if b.role in ("state", "setting")}
    if not all(n in own and len(own[n].shape) == dim and own[n].shape[0] for n, dim in dims.items()):
        return ["history or draft_tokens is not [rows, ...], is_eos not [vocabulary], or histogram not [depth + 1]"]
    sizes = signature.sizes
    rows = sizes.rows
    try:
        state = StepState.empty(sizes, torch.device("meta")).tensors()
    except RuntimeError:  # torch cannot count its bytes
        drafts = sizes.num_draft_tokens
        return [f"a state of {rows} rows of {sizes.capacity} tokens and {drafts} drafts is beyond any memory"]
    expected = [Binding(name, tuple(value.shape), value.dtype, role_of_state(name)) for name, value in state.items()]
    expected += [Binding(name, (name,), torch.int64, "size") for name in SIZE_NAMES]
    found = [_difference(inputs.get(binding.name), binding) for binding in expected]
    known = {binding.name for binding in expected}
    for b in signature.inputs:
        if b.name not in known and b.role not in ("row", "memory", "host", "cache", "option"):
            found.append(f"{b.name} is a {b.role}, which a step has none of")
        elif b.role in ("row", "option") and b.shape[:1] != (rows,):
            found.append(f"{b.name} has no line for each of the {rows} rows")
    kept = [b for b in signature.inputs if b.role in ("state", "row", "memory")]
    report = Binding("report", (rows, len(REPORT_FIELDS) + sizes.depth + 1), torch.int64, "result")
    results = {binding.name: binding for binding in signature.results}
    found += [_difference(results.get(binding.name), binding) for binding in (*kept, report)]
    readings = {name: b for name, b in results.items() if b.role == "reading"}
    known = {*readings, *(b.name for b in (*kept, report))}
    found += [f"{name} is no result of a step" for name in sorted(results.keys() - known)]
    options = {b.name.removeprefix("option_") for b in signature.inputs if b.role == "option"}
    found += [_flaw_of_reading(b, (rows, sizes.depth + 1), options) for b in readings.values()]
    return list(filter(None, found))


def _flaw_of_reading(binding: Binding, lines: tuple[int, int], options: set[str]) -> str:
    assert binding.reading is not None
    if binding.shape[:2] != lines or not binding.name.startswith(READING):
        return f"{binding.name} is {_say(binding)}, which tells nothing of the tokens of {lines[0]} rows"
    by = binding.reading.asked_by
    return f"{binding.name} is asked for by {by!r}, which is no option" if by and by not in options else ""


def _difference(found: Binding | None, expected: Binding) -> str:
    if found is None:
        return f"{expected.name} is missing"
    return "" if found == expected else f"{expected.name} is {_say(found)}, expected {_say(expected)}"


def _say(binding: Binding) -> str:
    return f"{binding.role} {str(binding.dtype).removeprefix('torch.')} {list(binding.shape)}"


def differences(what: str, said: Iterable[Binding], own: dict[str, tuple[torch.dtype | None, list[int | None]]]) -> str:
    """How what a graph itself has differs from what is said of it, the first difference; empty if it does not.

    Args:
        what: inputs or results, for the message.
        said: by the manifest.
        own: dtype (None if torch has none like it) and shape of each of the graph's, None for a size that may differ.
    """
    bindings = {binding.name: binding for binding in said}
    if bindings.keys() != own.keys():
        return f"{what}: only one of them knows {', '.join(sorted(bindings.keys() ^ own.keys()))}"
    for name, (dtype, shape) in own.items():
        wanted = [size if isinstance(size, int) else None for size in bindings[name].shape]
        fits = len(shape) == len(wanted) and all(a == b or b is None for a, b in zip(wanted, shape, strict=True))
        if dtype != bindings[name].dtype or not fits:
            return f"{what}: {name} is {dtype} {shape} in the graph, {_say(bindings[name])} in the manifest"
    return ""
