"""What the suite consists of: commands, each with its time limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A command that runs in a process of its own.

    Attributes:
        name: for the record.
        command: what follows `python -m`.
        limit_seconds: it is killed after so long.
        writes_json: whether it takes `--json PATH`.
    """

    name: str
    command: tuple[str, ...]
    limit_seconds: float
    writes_json: bool = True


def full(device: str) -> list[Part]:
    """What is run on a large GPU, the most important parts first.

    Compiling is what takes time. On 16 cores beside an H100 the kernels took 15 s, and the speed-up had not come to its
    first figure after 75 s; beside an H200 exactness took 308 s and the tests a little more, side by side.
    What the suite's own limit leaves no time for may be asked for with `--parts`. A part's limit is what it may take at
    the cost of those behind it. Commands without these arguments measure more.
    """
    heads = "32/8/128 32/32/128"  # Llama-3-8B, OPT-6.7b
    kernels = f"--dtype bfloat16 --rows 1 8 32 --contexts 512 4096 --heads {heads} --repeats 3"
    roofline = "--shape llama-3-8b --layers 8 --dtype bfloat16 --batches 1 8 32 --contexts 512 4096"
    ems = "--shape opt-6.7b --batches 1 8 24 --new-tokens 64 --repeats 1"
    speedup = (
        "--batches 8 --tokens 64 --repeats 3 --least-seconds 0 "
        "--candidates hf_generate hf_generate_static vanilla_padded ours_packed"
    )
    scaling = "--batches 1 4 16 64 --contexts 64 256 900 --drafts 7 --steps 32 --repeats 3"
    return [
        _tests("tests", 360),
        _bench("exactness", 330, "gpu_suite.exactness", device),
        _bench("synchronisations", 120, "gpu_suite.syncs", device),
        _bench("attention kernels", 60, "kernels", device, kernels),
        _bench("tree attention", 60, "gpu_suite.trees", device),
        _bench("moves of accepted tokens", 45, "gpu_suite.moves", device, "--repeats 3"),
        _bench("roofline, 8 layers of llama-3-8b", 100, "roofline", device, f"{roofline} --steps 32 --repeats 2"),
        _bench("EMS-SD table, opt-6.7b", 270, "ems_table", device, ems),
        _bench("speed-up, demo", 240, "speedup", device, speedup),
        _bench("scaling, demo", 90, "scaling", device, scaling),
        _bench("artifacts, tensorrt", 60, "gpu_suite.artifacts", device, "--target tensorrt"),
        _bench("artifacts, onnx", 60, "gpu_suite.artifacts", device, "--target onnx"),
    ]


def smoke(device: str) -> list[Part]:
    """The same parts on toy sizes, for a CPU: shows that they run, and nothing of speed."""
    toy = "--backend eager --repeats 1"
    places = "--batches 1 3 --contexts 20 --drafts 2 --steps 4"
    kernels = "--rows 2 --contexts 20 --tokens 1 4 --repeats 1"
    ems = f"{toy} --shape tiny-llama --batches 1 3 --prompt-tokens 20 --new-tokens 12 --profile .9 .5"
    rows = "--batches 1 2 --tokens 8 --least-seconds 0 --candidates hf_generate vanilla_padded ours_packed"
    speedup = f"{toy} --shape tiny-llama {rows}"
    scaling = f"{toy} --shapes tiny-llama {places} --at-batch 3 --at-context 20 --at-drafts 2"
    return [
        _tests("tests", 150),
        _bench("exactness", 150, "gpu_suite.exactness", device, "--smoke"),
        _bench("synchronisations", 150, "gpu_suite.syncs", device, "--smoke"),
        _bench("attention kernels", 150, "kernels", device, kernels),
        _bench("tree attention", 150, "gpu_suite.trees", device, "--smoke"),
        _bench("moves of accepted tokens", 150, "gpu_suite.moves", device, "--smoke --repeats 1"),
        _bench("roofline", 150, "roofline", device, f"{toy} --shape tiny-llama {places}"),
        _bench("EMS-SD table", 150, "ems_table", device, ems),
        _bench("speed-up", 150, "speedup", device, speedup),
        _bench("scaling", 150, "scaling", device, scaling),
        _bench("artifacts, tensorrt", 150, "gpu_suite.artifacts", device, "--target tensorrt --smoke"),
        _bench("artifacts, onnx", 150, "gpu_suite.artifacts", device, "--target onnx --smoke"),
    ]


def _bench(name: str, limit: float, module: str, device: str, arguments: str = "") -> Part:
    return Part(name, (f"bench.{module}", "--device", device, *arguments.split()), limit)


def _tests(name: str, limit: float) -> Part:
    """Those that need a GPU, side by side."""
    files = ("tests/ops/test_triton_forms.py", "tests/runtime/test_cuda.py", "tests/runtime/test_cuda_parts.py")
    options = ("-q", "--no-header", "-p", "no:cacheprovider", "--numprocesses", "auto", "--dist", "worksteal")
    return Part(name, ("pytest", *files, *options), limit, writes_json=False)


PARTS: dict[bool, Callable[[str], list[Part]]] = {False: full, True: smoke}
"""By whether it is the smoke run."""
