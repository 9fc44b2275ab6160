"""A Llama of transformers as a GGUF file, for llama.cpp."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def to_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write the float32 weights, sizes and vocabulary in the folder `source` to the file `target`."""
    config = json.loads((source / "config.json").read_text())
    layers, heads, kv_heads = (
        config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    file_type = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}[dtype]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)
    _add_vocabulary(writer, source, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, weight in load_file(source / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                weight = _interleaved(weight, count)
        known = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 2 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(known, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order that GGUF's rotary embedding reads: i, i + D/2, i + 1, ..."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path, size: int) -> None:
    """Token ids go in and out; what reads a GGUF file still wants to know what they say."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    texts = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([special.get(index, texts.get(index, f"[unused {index}]")) for index in range(size)])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[index in special] for index in range(size)])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
