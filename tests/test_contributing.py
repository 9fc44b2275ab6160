"""What CONTRIBUTING.md claims of the tree holds."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("passes", "export", "bench")  # folders that lie beside the package
WHOLE = ("exactness", "examples")  # folders of tests of whole models and of scripts
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
