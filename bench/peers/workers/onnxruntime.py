"""ONNX Runtime GenAI: a padded batch, and the model that its own builder makes."""

import json
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.peers.workers.protocol import Generate, Tokens, main


def convert(source: Path, target: Path, dtype: str) -> None:
    """The builder is a script: its files import each other by their bare names."""
    if dtype != "float32":
        raise ValueError(f"its CPU kernels do not take {dtype}")
    import onnxruntime_genai

    builder = Path(onnxruntime_genai.__file__).parent / "models" / "builder.py"
    sys.path.insert(0, str(builder.parent))
    with TemporaryDirectory() as scratch:
        sys.argv = [builder.name, "-i", str(source), "-o", str(target), "-p", "fp32", "-e", "cpu", "-c", scratch]
        runpy.run_path(str(builder), run_name="__main__")


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Generate]:
    """The id that is in no prompt pads; what ends a text is no id at all."""
    import numpy as np
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))

    session = {"intra_op_num_threads": options["threads"]}
    model_options = {"eos_token_id": options["unused_token"], "pad_token_id": options["unused_token"]}
    config.overlay(json.dumps({"model": {**model_options, "decoder": {"session_options": session}}}))
    model = onnxruntime_genai.Model(config)

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        longest = max(map(len, prompts))
        rows = np.full((len(prompts), longest), options["unused_token"], dtype=np.int32)
        for row, prompt in enumerate(prompts):
            rows[row, longest - len(prompt) :] = prompt
        search = onnxruntime_genai.GeneratorParams(model)
        search.set_search_options(max_length=longest + new_tokens, batch_size=len(prompts), do_sample=False)
        generator = onnxruntime_genai.Generator(model, search)
        generator.append_tokens(rows)
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]

    return onnxruntime_genai.__version__, generate


if __name__ == "__main__":
    main(convert, load)
