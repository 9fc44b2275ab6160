"""`train-drafter`: train a draft head for a saved model."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from emssd_compile.cli.models import PROGRAM, add_command, load_model, load_tokenizer, positive
from emssd_compile.drafters import HEADS, DraftHead
from emssd_compile.errors import OptionError
from emssd_compile.lowering import BACKENDS

EXAMPLES = f"""
examples:
  {PROGRAM} train-drafter --model llama/ --kind medusa --data texts/*.jsonl --out head/
      the model itself stays as it is; texts are cut into windows, and a twentieth of them is held out
  {PROGRAM} train-drafter --model llama/ --kind recurrent --data texts/*.txt --distil --out head/
      on what the model itself goes on with behind the beginnings of the texts
  {PROGRAM} train-drafter --model llama/ --kind mlp --data a.txt b.py --held-out c.txt --sizes depth=4 --out head/
      sizes are the fields of the head's configuration
  torchrun --nproc-per-node 4 -m emssd_compile train-drafter --model llama/ --kind eagle3 --data a.txt --out head/
      four GPUs share each step, each with a batch of its own; `accelerate launch` does as well

data files:
  *.jsonl    an object with "text" a line, each a text
  others     the whole file is one text

A run that was interrupted goes on when the same command is given again, and ends as if it had not been.
--out gets the head, curve.csv, curve.png and training.json; what the run needs to go on is in its folder work/.
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train-drafter", "train a draft head for a model", EXAMPLES)
    parser.add_argument(
        "--model", metavar="DIR", type=Path, required=True, help="folder of a Hugging Face causal LM (save_pretrained)"
    )
    kinds = ", ".join(sorted(_kinds())) or "none yet"
    parser.add_argument("--kind", required=True, help=f"of head: {kinds}")
    parser.add_argument("--data", metavar="FILE", type=Path, nargs="+", required=True, help="texts to learn from")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the head; a new folder, or this run's")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--held-out", metavar="FILE", type=Path, nargs="+", default=[], help="never learnt from")
    held_out.add_argument(
        "--held-out-share", metavar="X", type=float, help="part of the windows that is held out (default: 0.05)"
    )
    parser.add_argument("--tokens", metavar="N", type=positive, help="most tokens read of the data (default: all)")
    of_recipe = "default: as the kind's recipe says"
    parser.add_argument(
        "--distil",
        action=argparse.BooleanOptionalAction,
        help=f"learn from the model's own continuations of prompts cut from the data ({of_recipe})",
    )
    parser.add_argument(
        "--continued-epochs",
        metavar="N",
        type=int,
        help=f"times that, after the data, such continuations are read, too, at a tenth of the rate ({of_recipe})",
    )
    parser.add_argument("--temperature", metavar="T", type=float, help="that they are sampled at (default: 0, greedy)")
    parser.add_argument("--prompt-tokens", metavar="P", type=positive, help="of each such prompt (default: 64)")
    parser.add_argument(
        "--loss",
        choices=("tokens", "distribution", "acceptance"),
        help="cross-entropy with the text's tokens, or with the model's distribution, or how far the head's is from it "
        f"({of_recipe})",
    )
    parser.add_argument("--epochs", metavar="N", type=positive, help=f"times that the data is read ({of_recipe})")
    parser.add_argument("--learning-rate", metavar="X", type=float, help=f"the highest ({of_recipe})")
    parser.add_argument("--window", metavar="S", type=positive, help="tokens of a window (default: 512)")
    parser.add_argument("--batch", metavar="B", type=positive, help="windows at a time (default: 4)")
    parser.add_argument("--accumulate", metavar="N", type=positive, help="batches in a step (default: 1)")
    parser.add_argument(
        "--sizes", metavar="NAME=VALUE", nargs="+", default=[], type=_size, help="of the head's configuration"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the model, and what the head computes in; its weights are float32 (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--checkpoint-every", metavar="N", type=positive, help="steps (default: 100)")
    parser.add_argument("--tensorboard", action="store_true", help="write event files, too, to DIR/tensorboard")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="that decodes continuations; eager starts at once (default: inductor)"
    )


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    # Read by cuBLAS when it starts: with it, what is summed on a GPU is summed in one order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from emssd_compile.training.data import read_documents
    from emssd_compile.training.options import TrainingOptions
    from emssd_compile.training.processes import launched
    from emssd_compile.training.train import Texts, train

    head_class = _kind(arguments.kind)
    given = {name: getattr(arguments, name, None) for name in TrainingOptions.__dataclass_fields__}
    options = TrainingOptions.of(head_class.recipe, **given | {"sizes": dict(arguments.sizes)})
    data = read_documents(arguments.data)
    held_out = read_documents(arguments.held_out) if arguments.held_out else []
    with launched(arguments.device) as (processes, device):
        model = load_model(arguments.model, arguments.dtype, "--model").to(device)
        train(
            model,
            head_class,
            Texts(data, held_out, load_tokenizer(arguments.model)),
            arguments.out,
            options,
            processes=processes,
            note=notes.print if processes.is_main_process else lambda text: None,
            shows_progress=True,
            tensorboard=arguments.tensorboard,
        )
        if processes.is_main_process:
            notes.print(f"{arguments.out} is written")


def _kinds() -> dict[str, type[DraftHead]]:
    return {head.kind: head for head in HEADS}


def _kind(name: str) -> type[DraftHead]:
    kinds = _kinds()
    if name not in kinds:
        raise OptionError(f"--kind {name}: there is no such head; choose one of {', '.join(sorted(kinds))}")
    return kinds[name]


def _size(text: str) -> tuple[str, Any]:
    """`name=value`; the value as JSON, a list as a tuple, or else as text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        read = json.loads(value)
    except ValueError:
        return name, value
    return name, tuple(read) if isinstance(read, list) else read
