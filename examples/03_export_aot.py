"""Export the shipped model as machine code, load the artifact, and decode without the model.

python examples/03_export_aot.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import emssd_compile

TARGET = Path(__file__).parent / "demo_model" / "target"
PROMPTS = ["import os\nimport sys\n", "def read_lines(path):\n    ", "class Stack:\n    def push(self, item):\n"]


def main() -> None:
    """Export, load, decode, compare."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

    fast = emssd_compile.optimize(model, max_batch=4, max_length=256, backend="eager")
    fast.export_aot(folder, progress=True)

    decoder = emssd_compile.load(folder)
    ids = tokenizer(PROMPTS)["input_ids"]
    rows = decoder.generate(ids, max_new_tokens=32)
    print(tokenizer.decode(rows[1]))
    print(f"{decoder.stats.mean_acceptance_length:.2f} tokens a row and step, by AOTInductor from {folder}")
    assert rows == fast.generate(ids, max_new_tokens=32), "the tokens are the model's own"


if __name__ == "__main__":
    main()
