"""What a request is, and that naming it takes no circle of imports."""

import ast
from pathlib import Path

import torch

import emssd_compile.runtime
from emssd_compile.runtime.requests import Request


def test_a_request_that_is_ended_early_forgets_what_it_emitted_since():
    request = Request(0, torch.tensor([5]), 9, output=[1, 2, 3, 4])
    request.end(2)
    assert request.output == [1, 2]
    assert request.finished


def test_no_module_of_the_runtime_imports_one_that_needs_it():
    """Also not for type checking alone: a circle of names is a circle of thoughts."""
    (folder,) = map(Path, emssd_compile.runtime.__path__)
    needs: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = [node.module or "" for node in nodes]
        needs[path.stem] = {m.rpartition(".")[2] for m in modules if m.startswith("emssd_compile.runtime.")}
    done: set[str] = set()
    while ready := {name for name in needs.keys() - done if needs[name] <= done}:
        done |= ready
    assert not needs.keys() - done
