"""What CONTRIBUTING.md claims of the tree holds."""

import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

from emssd_compile.step.parts import Part

ROOT = Path(__file__).parents[1]
MAPPED = ("passes", "export", "bench")  # folders that lie beside the package
WHOLE = ("exactness", "examples")  # folders of tests of whole models and of scripts
PARTS = ("drafters", "acceptance", "policies", "logits")  # folders of parts, with the registry of each
KNOWN_BY_NAME = {
    "emssd_compile/layouts.py": {"AllDrafts", "Throughput"},  # the registry of layouts: each names its policy
    "emssd_compile/cli/models.py": {"DraftModel"},  # made of a model that the command line names
}
BASES = {"DraftHead"}  # what the heads have in common, and no part itself
DOCUMENTS = ("test_readme.py", "test_contributing.py", "test_packaging.py")


def _has_source(test: Path) -> bool:
    """Whether `tests/a/test_b_of_something.py` stands for a file or folder `a/b`, or for `emssd_compile/b`."""
    folder = test.parent
    mirrored = ROOT / folder if folder.parts and folder.parts[0] in MAPPED else ROOT / "emssd_compile" / folder
    words = test.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    return any(
        (base / f"{mark}{name}{suffix}").exists()
        for base in (mirrored, ROOT / "emssd_compile")
        for name in names
        for mark in ("", "_")
        for suffix in (".py", "")
    )


def test_the_range_of_transformers_is_the_same_everywhere():
    ((oldest, newest),) = re.findall(r"TRANSFORMERS := (\S+) (\S+)\n", (ROOT / "Makefile").read_text())
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["hf"][0]
    assert f"{asked.removeprefix('transformers>=')}.0.0" == oldest
    assert f"{oldest} and {newest}, the oldest and the newest" in (ROOT / "README.md").read_text()
    assert re.search(r"^make .*\brange\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "test", sorted(str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py"))
)
def test_tests_are_named_like_their_source(test):
    path = Path(test)
    if path.parts[0] in WHOLE or test in DOCUMENTS:
        return
    assert _has_source(path), f"tests/{test} is not named like a source file in the folder that it mirrors"


def test_a_test_without_a_source_would_be_noticed():
    assert not _has_source(Path("passes/test_nothing_of_ours.py"))


def _part_names() -> set[str]:
    """The classes of all parts of the package."""
    found = set()
    for folder in PARTS:
        package = importlib.import_module(f"emssd_compile.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            values = vars(importlib.import_module(module.name)).values()
            found |= {
                v.__name__
                for v in values
                if isinstance(v, type) and issubclass(v, Part) and v.__module__ == module.name
            }
    return found


def test_no_part_is_known_by_name_but_in_the_folder_that_lists_it():
    """So a part is added with its file and one line in its registry: nothing else asks which part it has before it."""
    names = _part_names() - BASES
    assert {"GreedyMatch", "NoDrafter", "MinNewTokens", "Throughput"} <= names
    own = tuple(ROOT / "emssd_compile" / folder for folder in PARTS)
    sources = [path for folder in ("emssd_compile", "passes", "export") for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in sources:
        known = names.intersection(re.findall(r"\w+", path.read_text()))
        if known and not any(path.is_relative_to(folder) for folder in own):
            found[str(path.relative_to(ROOT))] = known
    assert found == KNOWN_BY_NAME
