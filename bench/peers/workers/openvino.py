"""OpenVINO GenAI: its pipeline of continuous batching, with or without prompt lookup."""

import shutil
from pathlib import Path
from typing import Any

from bench.peers.workers.protocol import Generate, Tokens, main


def convert(source: Path, target: Path, dtype: str) -> None:
    """Both dtypes read the same file: OpenVINO rounds as it compiles."""
    from bench.peers.workers.to_openvino import to_openvino

    to_openvino(source, target)
    shutil.copy(source / "config.json", target)


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Generate]:
    """Keys and values are kept in the dtype of the weights; OpenVINO's default are 8 bits."""
    import numpy as np
    import openvino
    import openvino_genai

    precision = {"float32": "f32", "bfloat16": "bf16"}[options["dtype"]]
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": options["threads"],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if options["lookup"]:
        properties["prompt_lookup"] = True
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = options["max_batch"]
    scheduler.max_num_batched_tokens = options["max_batch"] * options["max_length"]
    scheduler.cache_size = 0  # grows
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.eos_token_id = new_tokens, True, 0
        config.stop_token_ids = {0}  # the file names none, and -1 is refused
        if options["lookup"]:
            config.num_assistant_tokens, config.max_ngram_size = options["lookup"], options["max_ngram"]
        rows = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [list(each.m_generation_ids[0]) for each in pipeline.generate(rows, [config] * len(rows))]

    return openvino_genai.__version__, generate


if __name__ == "__main__":
    main(convert, load)
