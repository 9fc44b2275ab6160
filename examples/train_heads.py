"""Train the draft heads that are shipped with the demo model.

    python examples/train_heads.py --work build/heads --out examples/demo_model/heads

They learn what the target says of the source files of the running Python's standard library, as the target did before
them. A run that was stopped goes on at its last checkpoint in `--work`. What is shipped is in bf16.
"""

import argparse
import sys
from pathlib import Path

import torch

from demo_training.corpus import read_corpus
from emssd_compile.cli import main as emssd_compile
from emssd_compile.drafters import load_head

TARGET = Path(__file__).parent / "demo_model" / "target"
SIZES = {
    "mlp": ["inner_size=256", "num_heads=4", "tie_weights=true", "scale_input=true"],
    "recurrent": ["exit_size=128"],
    "medusa": ["num_lm_heads=0", "num_heads=4"],
    "mtp": [],
    "eagle3": [],
    "block": ["num_layers=2"],
    "peagle": ["num_layers=1"],
}
"""What is not as the kind has it by default: the demo model's heads are small."""


def write_texts(documents: dict[str, str], folder: Path) -> list[str]:
    """Write each text to a file of its own; returns their names."""
    for path, text in documents.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return [str(folder / path) for path in documents]


def main() -> int:
    """Train the heads one after another; returns an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="texts and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="a folder for each kind is made in it")
    parser.add_argument("--kinds", nargs="+", choices=SIZES, default=list(SIZES), help="(default: all)")
    parser.add_argument("--tokens", type=int, default=800_000, help="of text (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows at a time (default: %(default)s)")
    options = parser.parse_args()
    train, held_out = (
        write_texts(documents, options.work / name)
        for documents, name in zip(read_corpus(), ("train", "held_out"), strict=True)
    )
    for kind in options.kinds:
        command = ["train-drafter", "--model", str(TARGET), "--kind", kind, "--out", str(options.work / kind)]
        command += ["--data", *train, "--held-out", *held_out, "--no-distil", "--loss", "distribution"]
        command += ["--tokens", str(options.tokens), "--window", str(options.window), "--batch", str(options.batch)]
        command += ["--epochs", "1"]
        command += ["--sizes", *SIZES[kind]] if SIZES[kind] else []
        if status := emssd_compile(command):
            return status
        load_head(options.work / kind).to(torch.bfloat16).save_pretrained(options.out / kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
