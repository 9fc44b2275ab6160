"""Each export target with models and drafters: is it built, does it run here, are its tokens the same, how fast is it?

    python -m bench.exports
    python -m bench.exports --targets onnx aot --models demo --json exports.json

Tokens are compared with those of `optimize(model, backend="eager")` on the same weights. The step ratio is the time of
a decoding step of the artifact over that of the Inductor backend, in the same process, taking turns. TensorRT engines
are built in half precision, for the GPU that is here or for `--compute-capability`; without a GPU they do not run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

import emssd_compile
from bench import shapes
from bench.command import argument_parser, at_least, describe, hardware, make_console, parse, save, versions
from bench.overhead import decode
from bench.timing import alternate, median_ratio
from emssd_compile import LoadedModel, OptimizedModel
from emssd_compile.drafters import DraftModel
from emssd_compile.errors import EmssdError
from emssd_compile.export import TARGETS

MAX_LENGTH = 512
DRAFTERS = ("none", "prompt-lookup", "draft-model")
DRAFT_OF = {"demo": "demo-draft"}


@dataclass(frozen=True)
class Line:
    """One artifact.

    Attributes:
        target, model, drafter: what it is made of.
        built: seconds of the export, or why there is none.
        megabytes: of all its files.
        run: whether it ran here, or why not.
        identical: whether its tokens are those of the eager backend.
        step_ratio: time of its decoding step over that of the Inductor backend.
    """

    target: str
    model: str
    drafter: str
    built: float | str
    megabytes: float | None = None
    run: str = "no"
    identical: bool | None = None
    step_ratio: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, run, compare, print, save; returns 1 if tokens differ or an export fails."""
    options = parse_arguments(arguments)
    console = make_console()
    lines: list[Line] = []
    for model in options.models:
        for drafter in options.drafters:
            with console.status(f"{model}, {drafter}: compiling"):
                subject = Subject(model, drafter, options)
            for target in options.targets:
                with console.status(f"{model}, {drafter}: {target}"), tempfile.TemporaryDirectory() as folder:
                    lines.append(subject.export(target, Path(folder) / "artifact"))
                console.print(" ".join(f"{value}" for value in asdict(lines[-1]).values()), highlight=False)
    console.print(_table(lines, options))
    console.print(f"{describe(hardware())}\n{describe(versions())}")
    if options.json:
        tables = [{"title": "exports", "rows": [asdict(line) for line in lines]}]
        settings = ("batch", "tokens", "repeats", "least_seconds")
        save(options.json, "bench.exports", tables, **{name: getattr(options, name) for name in settings})
    return int(any(line.identical is False or isinstance(line.built, str) for line in lines))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, least_seconds=15)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=shapes.NAMES,
        default=["demo", "tiny-opt", "tiny-gpt2"],
        help="default: %(default)s",
    )
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=list(DRAFTERS), help="default: all")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="new tokens a row (default: %(default)s)")
    parser.add_argument(
        "--compute-capability", default="8.0", help="of the engines, without a GPU (default: %(default)s)"
    )
    return parse(parser, arguments)


class Subject:
    """A model with a drafter, compiled by the backends that targets are compared with.

    Args:
        model: its name.
        drafter: one of `DRAFTERS`.
        options: the command line.
    """

    def __init__(self, model: str, drafter: str, options: argparse.Namespace) -> None:
        self.model, self.drafter, self.options = model, drafter, options
        self.prompts = shapes.spread(shapes.prompts(model), options.batch)
        self.eager = self._optimize(torch.float32, "eager")
        self.compiled = self._optimize(torch.float32, "inductor")
        self.expected = self._tokens(self.eager)

    def export(self, target: str, folder: Path) -> Line:
        """Export to a target and see what it does."""
        line = Line(target, self.model, self.drafter, 0.0)
        try:
            seconds = self._write(target, folder)
        except EmssdError as error:
            return replace(line, built=str(error).splitlines()[0])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        line = replace(line, built=round(seconds, 1), megabytes=round(size, 1))
        if target == "tensorrt" and not torch.cuda.is_available():
            return replace(line, run="needs a GPU")
        loaded = emssd_compile.load(folder, device=self.options.device)
        # A half-precision engine may break near-ties differently: `bench.gpu_suite` judges those.
        identical = self._tokens(loaded) == self.expected if target != "tensorrt" else None
        decoders: dict[str, OptimizedModel | LoadedModel] = {"own": loaded, "inductor": self.compiled}
        steps = {name: partial(self._step, decoder) for name, decoder in decoders.items()}
        runs = alternate(steps, self.options.repeats, self.options.least_seconds)
        ratio = median_ratio(runs["own"][1:], runs["inductor"][1:])
        return replace(line, run="yes", identical=identical, step_ratio=round(ratio, 2))

    def _write(self, target: str, folder: Path) -> float:
        if target != "tensorrt":
            started = time.perf_counter()
            {"onnx": self.eager.export_onnx, "aot": self.eager.export_aot}[target](folder)
            return time.perf_counter() - started
        half = self._optimize(torch.float16, "eager")
        has_gpu = torch.cuda.is_available()
        capability = "{}.{}".format(*torch.cuda.get_device_capability()) if has_gpu else self.options.compute_capability
        started = time.perf_counter()
        half.export_tensorrt(folder, compute_capabilities=[capability])
        return time.perf_counter() - started

    def _optimize(self, dtype: torch.dtype, backend: str) -> OptimizedModel:
        device = self.options.device
        model = shapes.build(self.model, device, dtype)
        draft: str | DraftModel = self.drafter if self.drafter != "draft-model" else DraftModel(self._draft(dtype))
        return emssd_compile.optimize(
            model, draft, max_batch=self.options.batch, max_length=MAX_LENGTH, backend=backend, layout="packed"
        )

    def _draft(self, dtype: torch.dtype) -> PreTrainedModel:
        return shapes.build(DRAFT_OF.get(self.model, self.model), self.options.device, dtype)

    def _tokens(self, decoder: OptimizedModel | LoadedModel) -> object:
        return decoder.generate(self.prompts, max_new_tokens=self.options.tokens, eos_token_id=None)

    def _step(self, decoder: OptimizedModel | LoadedModel) -> float:
        decoding = decode(decoder, self.prompts, self.options.tokens)
        return decoding.step_seconds / decoding.num_steps


def _table(lines: Sequence[Line], options: argparse.Namespace) -> Table:
    columns = ("target", "model", "drafter", "built, s", "MB", "run", "identical", "step / Inductor's")
    table = Table(*columns, title=f"exports, batch {options.batch}")
    for line in lines:
        table.add_row(*("-" if value is None else str(value) for value in asdict(line).values()))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
