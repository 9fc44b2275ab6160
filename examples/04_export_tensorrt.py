"""Build a TensorRT engine of the shipped model; where there is a GPU, load the artifact and decode with it.

    python examples/04_export_tensorrt.py [FOLDER]

The engine is built for a compute capability that is named, so no GPU is needed to build it, only to run it.
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
    """Build; load and decode where that is possible."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float16).eval()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    has_gpu = torch.cuda.is_available()
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if has_gpu else "8.0"

    fast = emssd_compile.optimize(model, max_batch=4, max_length=256, backend="eager")
    fast.export_tensorrt(folder, compute_capabilities=[capability], progress=True)
    print(f"an engine for compute capability {capability} is in {folder}")

    if has_gpu:
        decoder = emssd_compile.load(folder, device="cuda")
        tokenizer = AutoTokenizer.from_pretrained(TARGET)
        rows = decoder.generate(tokenizer(PROMPTS)["input_ids"], max_new_tokens=32)
        print(tokenizer.decode(rows[1]))


if __name__ == "__main__":
    main()
