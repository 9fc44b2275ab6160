"""CTranslate2, and the model that its own converter makes."""

import json
from pathlib import Path
from typing import Any

from bench.peers.workers.protocol import Generate, Tokens, main


def convert(source: Path, target: Path, dtype: str) -> None:
    """Weights keep their values; `load` says in what they are computed."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source)).convert(str(target), force=True)


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Generate]:
    """Ids go in and out as the texts of a vocabulary, so that is read, too."""
    import ctranslate2

    if options["dtype"] not in ctranslate2.get_supported_compute_types("cpu"):
        raise ValueError(f"it does not compute in {options['dtype']} on this CPU")
    settings = {"compute_type": options["dtype"], "inter_threads": 1, "intra_threads": options["threads"]}
    model = ctranslate2.Generator(str(folder), "cpu", **settings)
    texts = json.loads((folder / "vocabulary.json").read_text())

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        rows = [[texts[token] for token in prompt] for prompt in prompts]
        length = {"max_length": new_tokens, "include_prompt_in_result": False, "end_token": []}
        return [result.sequences_ids[0] for result in model.generate_batch(rows, **length)]

    return ctranslate2.__version__, generate


if __name__ == "__main__":
    main(convert, load)
