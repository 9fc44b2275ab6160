"""The wheel holds exactly what the source tree holds, and works where nothing but the wheel and torch is installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"passes": "emssd_compile/passes", "export": "emssd_compile/export"}
"""Top-level folders and where they are installed."""


def source_files() -> dict[str, Path]:
    """Every file of the package, by its path in the wheel (`emssd_compile/passes/x.py` for `passes/x.py`)."""
    files = {}
    for top, installed in {"emssd_compile": "emssd_compile", **MAPPED}.items():
        for path in (ROOT / top).rglob("*"):
            inner = path.relative_to(ROOT / top)
            through_symlink = top == "emssd_compile" and inner.parts[0] in MAPPED
            if path.is_file() and not through_symlink and "__pycache__" not in inner.parts:
                files[str(PurePosixPath(installed, *inner.parts))] = path
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built the way a release is: sdist from the tree, wheel from the sdist."""
    tree = tmp_path_factory.mktemp("tree")  # a copy, since setuptools writes build/ and *.egg-info beside the sources
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    for name in ["emssd_compile", *MAPPED]:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    dist = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree])
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed_python(wheel, tmp_path_factory) -> Path:
    """Python of a new environment that holds the wheel, and sees torch through a path file."""
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    site_packages = next(root.glob("lib/python*/site-packages"))
    (site_packages / "torch_of_the_test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str | Path]) -> str:
    """Runs a command away from the source tree; its output, or a failure that shows it."""
    done = subprocess.run(command, cwd=ROOT.anchor, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_packages_lists_every_folder_with_python_files():
    found = {str(PurePosixPath(name).parent).replace("/", ".") for name in source_files() if name.endswith(".py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("folder", MAPPED)
def test_an_uninstalled_checkout_sees_the_mapped_folder(folder):
    link = ROOT / MAPPED[folder]
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == set(source_files())
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_wheel_carries_types_and_native_sources():
    names = source_files()
    assert "emssd_compile/py.typed" in names
    assert any(name.startswith("emssd_compile/ops/csrc/") and name.endswith(".cpp") for name in names)


def test_installed_wheel_imports(installed_python):
    code = """
import emssd_compile, emssd_compile.export, emssd_compile.passes
for module in emssd_compile, emssd_compile.export, emssd_compile.passes:
    print(module.__file__)
"""
    files = run([installed_python, "-I", "-c", code]).splitlines()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed_python.parents[1]) for file in files)


def test_the_command_is_installed(installed_python):
    assert run([installed_python.parent / "emssd-compile", "--version"]).startswith("emssd_compile ")
    assert "emssd-compile" in run([installed_python.parent / "emssd-compile", "generate", "--help"])


def test_torch_finds_all_it_looks_for_at_its_start():
    """Without numpy it warns at each."""
    assert "numpy" in map(name_of, PYPROJECT["project"]["dependencies"])


def test_import_loads_no_optional_dependency_and_is_quick(installed_python):
    code = """
import sys, time, torch
before, started = set(sys.modules), time.process_time()
import emssd_compile
print(time.process_time() - started)
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    seconds, loaded = run([installed_python, "-I", "-c", code]).splitlines()
    extras = PYPROJECT["project"]["optional-dependencies"]
    optional = {name_of(requirement) for extra in extras.values() for requirement in extra} - {"emssd-compile"}
    assert not {*optional, "sympy"} & {*re.findall(r"\w+", loaded)}  # passes need sympy, which takes its time
    assert float(seconds) < 0.5


def test_constraints_pin_every_dependency():
    """Only what takes a GPU is free: it matches the machine's driver, and `onnxruntime-gpu` excludes `onnxruntime`."""
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = PYPROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    named = {name_of(requirement) for requirement in [*project["dependencies"], *extras]}
    assert named - pinned == {"emssd-compile", "onnxruntime-gpu", "tensorrt"}


def name_of(requirement: str) -> str:
    """The normalised name in a requirement: `"pre-commit"` for `"pre_commit==4.7.0"`."""
    return re.split(r"[\[=<>~! ]", requirement)[0].lower().replace("_", "-")
