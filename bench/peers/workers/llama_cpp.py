"""llama.cpp, by its C interface: all prompts in one batch, then a token of each row."""

from pathlib import Path
from typing import Any

from bench.peers.workers.protocol import Generate, Tokens, main


def convert(source: Path, target: Path, dtype: str) -> None:
    """One file."""
    from bench.peers.workers.to_gguf import to_gguf

    to_gguf(source, target / "model.gguf", dtype)


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Generate]:
    """Keys and values are kept in the dtype of the weights; llama.cpp's default is float16."""
    import llama_cpp as cpp
    import numpy as np

    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), cpp.llama_model_default_params())
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    size = options["max_batch"] * options["max_length"]
    params = cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = size, options["max_batch"], size
    params.n_threads = params.n_threads_batch = options["threads"]
    params.type_k = params.type_v = {"float32": cpp.GGML_TYPE_F32, "bfloat16": cpp.GGML_TYPE_BF16}[options["dtype"]]
    context = cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp made no context")
    batch = cpp.llama_batch_init(size, 0, 1)

    def feed(rows: Tokens, starts: list[int]) -> list[int]:
        """The token that follows each row, of which all but the first `starts` tokens are new."""
        places = []
        batch.n_tokens = 0
        for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
            for position in range(start, len(tokens)):
                index = batch.n_tokens
                batch.token[index], batch.pos[index], batch.logits[index] = tokens[position], position, False
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.n_tokens += 1
            batch.logits[index] = True
            places.append(index)
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = (np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, place), (vocabulary,)) for place in places)
        return [int(row.argmax()) for row in logits]

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        rows, starts = [[*prompt] for prompt in prompts], [0] * len(prompts)
        for _ in range(new_tokens):
            following, starts = feed(rows, starts), [len(row) for row in rows]
            for row, token in zip(rows, following, strict=True):
                row.append(token)
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    return cpp.__version__, generate


if __name__ == "__main__":
    main(convert, load)
