"""Whether the export targets can be imported here.

python -m bench.gpu_suite.engines --json engines.json
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import emssd_compile.export
from bench.command import argument_parser, parse, save


def main(arguments: Sequence[str] | None = None) -> int:
    """Import each, print, save; returns 1 if one fails."""
    options = parse_arguments(arguments)
    package = emssd_compile.export
    found = {name: _import(f"{package.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(package.__path__)}
    context = {} if found else {"skipped": "there are no export targets yet"}
    for line in [f"{name}: {answer}" for name, answer in found.items()] or context.values():
        print(line)
    if options.json:
        rows = [{"target": name, "import": answer} for name, answer in found.items()]
        save(options.json, "bench.gpu_suite.engines", [{"title": "export targets", "rows": rows}], **context)
    return int(any(answer != "ok" for answer in found.values()))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return parse(argument_parser(__doc__), arguments)


def _import(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a target whose libraries are broken may raise anything
        return f"{type(error).__name__}: {error}"
    return "ok"


if __name__ == "__main__":
    sys.exit(main())
