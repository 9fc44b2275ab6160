"""Builds and loads the C++ forms of the ops for CPU, at first need and once per machine.

The library is compiled by the machine's own C++ compiler into a cache folder: ``$EMSSD_CACHE_DIR``, else
``$XDG_CACHE_HOME/emssd_compile``, else ``~/.cache/emssd_compile``. A library that was damaged there is built anew, and
one that cannot be kept there serves this process only. Without a compiler, or if ``EMSSD_CPU_KERNELS=0`` is set, the
ops keep their eager references and `cpu_kernel_status` says why.

`standalone_library` is for artifacts: it serves machines without a compiler, and processes without Python.
"""

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from emssd_compile.files import cache_folder, write_whole

_logger = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "csrc"
_COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-w")
# The instruction sets behind torch's own names, as in its build: what torch dispatches to, this machine can run. Not
# -march=native: the cache folder may be shared by machines that differ.
_INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
_OPS = (
    "append_kv",
    "fingerprint",
    "grouped_linear",
    "kept_threshold",
    "move_kv",
    "ragged_attention",
)
"""Those that the library implements."""
_SEAL_BYTES = hashlib.sha256().digest_size
_prebuilt: list[str] = []  # the library in use where none could be built
_begun: list[Future[tuple[Path | None, bytes]]] = []  # what `begin_cpu_kernels` began and nobody has asked for
_lock = threading.RLock()


class CannotBuildError(Exception):
    """Why there is no C++ form on this machine."""


def begin_cpu_kernels() -> None:
    """Begins to build what `load_cpu_kernels` waits for, in the background: compilers are processes of their own."""
    with _lock:
        if not (_begun or _load.cache_info().currsize or _is_disabled()):
            pool = ThreadPoolExecutor(1, thread_name_prefix="emssd-cpu-kernels")
            _begun.append(pool.submit(_build))
            pool.shutdown(wait=False)


def load_cpu_kernels(prebuilt: Callable[[], bytes] | None = None, origin: object = None) -> bool:
    """Makes the ops use their C++ forms on CPU tensors, building them if need be (about 15 seconds, once).

    Args:
        prebuilt: gives a `standalone_library` of a machine like this one, to use where none can be built.
        origin: where that comes from, for `cpu_kernel_status`.

    Returns:
        Whether they are in use. If not, the ops work all the same, slowly; `cpu_kernel_status` has the reason.
    """
    with _lock:  # a library that is loaded twice cannot register its ops
        loaded, status = _load()
        if loaded or _prebuilt or _is_disabled():
            return loaded or bool(_prebuilt)
        if prebuilt is None:
            _warn(status)
            return False
        _load_content(prebuilt())
        _prebuilt.append(f"C++ ({torch.backends.cpu.get_cpu_capability()}): {origin}")
        return True


def cpu_kernel_status() -> str:
    """One line: the library in use, or why the references are used instead."""
    if _load.cache_info().currsize == 0:
        return "reference: load_cpu_kernels() has not been called"
    return _prebuilt[0] if _prebuilt else _load()[1]


def standalone_library() -> bytes:
    """A library that needs neither a compiler nor Python: it defines the ops, too, where nobody has.

    Raises:
        CannotBuildError: there is no C++ compiler, or it fails.
    """
    return _build(definitions=_definitions())[1]


def _definitions() -> str:
    """C++ that defines the ops as this process knows them, but for those that are defined."""
    schemas = {name: str(getattr(torch.ops.emssd, name).default._schema).removeprefix("emssd::") for name in _OPS}
    known = "c10::Dispatcher::singleton().findSchema"
    lines = [f'  if (!{known}({{"emssd::{name}", ""}})) m.def("{schema}");' for name, schema in schemas.items()]
    return "\n".join(["TORCH_LIBRARY_FRAGMENT(emssd, m) {", *lines, "}", ""])


@functools.cache
def _warn(status: str) -> None:
    reason = status.removeprefix("reference: ")
    _logger.warning("emssd CPU kernels are not available, the slow references are used: %s", reason)


def _is_disabled() -> bool:
    return os.environ.get("EMSSD_CPU_KERNELS") == "0"


@functools.cache
def _load() -> tuple[bool, str]:
    if _is_disabled():
        return False, "reference: EMSSD_CPU_KERNELS=0 is set"
    try:
        library, content = _begun.pop().result() if _begun else _build()
        if library is None:
            _load_content(content)
        else:
            torch.ops.load_library(library)
    except (CannotBuildError, OSError) as error:
        return False, f"reference: {error}"
    return True, f"C++ ({torch.backends.cpu.get_cpu_capability()}): {library or 'built for this process'}"


def _load_content(content: bytes) -> None:
    """Load a library that is in no file; what is loaded stays when its file is gone."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        library.write_bytes(content)
        torch.ops.load_library(library)


def _build(definitions: str = "") -> tuple[Path | None, bytes]:
    """The library for this source, compiler, torch and processor; compiled unless the cache holds it whole.

    Args:
        definitions: C++ source to build in.

    Returns:
        Its place in the cache, None if it cannot be kept there; and its content.
    """
    if sys.platform != "linux":
        raise CannotBuildError(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    compiler = _compiler()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*_COMPILE_FLAGS, *_instruction_sets(capability), *_capability_macros(capability)]
    library = cache_folder() / f"emssd_{_key(compiler, flags, definitions)}.so"
    content = _read_whole(library)
    if content is not None:
        return library, content
    _logger.info("building the emssd CPU kernels into %s", library)
    with tempfile.TemporaryDirectory() as folder:
        content = _compile(compiler, flags, definitions, Path(folder)).read_bytes()
    return (library if _keep(library, content) else None), content


def _read_whole(library: Path) -> bytes | None:
    """A library of the cache without its seal, the SHA-256 of all before it; None unless it is there and whole."""
    try:
        data = library.read_bytes() if library.is_file() else b""
    except OSError:
        return None
    content, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if content and hashlib.sha256(content).digest() == seal:
        return content
    if library.exists():
        _logger.warning("%s is damaged; it is built anew", library)
    return None


def _keep(library: Path, content: bytes) -> bool:
    """Put a library into the cache, sealed; says whether that was possible. If not, the next process builds it."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        if library.is_dir():
            shutil.rmtree(library)
        write_whole(library, content + hashlib.sha256(content).digest())
    except OSError as error:
        _logger.warning(
            "the emssd CPU kernels cannot be kept in %s (%s), so each process builds them anew; set EMSSD_CACHE_DIR to "
            "a folder that can be written",
            library.parent,
            error.strerror or error,
        )
        return False
    return True


def _compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else the first one found."""
    for candidate in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise CannotBuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++); install g++ or set CXX")


def _instruction_sets(capability: str) -> list[str]:
    """Flags of the compiler; products of bfloat16 are an extension of AVX512 that torch has no level for."""
    found = list(_INSTRUCTION_SETS.get(capability, ()))
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        found.append("-mavx512bf16")
    return found


def _capability_macros(capability: str) -> list[str]:
    """The macros by which ATen's vector headers choose an instruction set."""
    name = capability if capability in _INSTRUCTION_SETS else "DEFAULT"
    return [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]


def _key(compiler: list[str], flags: list[str], definitions: str) -> str:
    digest = hashlib.sha256(repr((compiler, flags, torch.__version__, definitions)).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compile(compiler: list[str], flags: list[str], definitions: str, folder: Path) -> Path:
    # torch.utils.cpp_extension imports setuptools; only a build pays for that.
    from torch.utils.cpp_extension import include_paths, library_paths

    sources, library = sorted(_SOURCES.glob("*.cpp")), folder / "library.so"
    if definitions:
        sources.append(folder / "definitions.cpp")
        sources[-1].write_text(f"#include <torch/library.h>\n{definitions}")
    objects = [folder / f"{source.stem}.o" for source in sources]
    includes = [f"-I{path}" for path in (_SOURCES, *include_paths())]
    pairs = zip(map(str, sources), map(str, objects), strict=True)
    with ThreadPoolExecutor(len(sources)) as pool:
        [*pool.map(_run, ([*compiler, *flags, *includes, "-c", source, "-o", obj] for source, obj in pairs))]
    # Linked without -fopenmp: the OpenMP functions must come from the runtime torch brings, never from a second one.
    # -z now: should torch's runtime lack one of them, loading fails here instead of the first call.
    search = [f"-L{path}" for path in library_paths()]
    _run([*compiler, "-shared", *map(str, objects), "-o", str(library), *search, "-ltorch_cpu", "-lc10", "-Wl,-z,now"])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CannotBuildError(f"{command[0]} failed: {errors[0] if errors else f'exit status {done.returncode}'}")
