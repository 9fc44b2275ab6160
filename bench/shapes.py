"""Models to measure, by name: the shipped demo model, and published shapes with random weights.

The speed of a model does not depend on what its weights say; how many drafts it accepts does. Figures that involve
drafts are therefore those of the demo model, or say where their drafts come from.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from bench.real_models import smollm2
from emssd_compile.errors import OptionError

Value = TypeVar("Value")

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
CHAT_PROMPTS = DEMO_MODEL.with_name("chat_prompts.json")


def _opt(hidden: int, layers: int, heads: int, **other: int) -> PreTrainedConfig:
    """Sizes of arXiv 2205.01068, table 1; the MLP is four times as wide as the model."""
    sizes: dict[str, Any] = {"vocab_size": 50272, "max_position_embeddings": 2048, "ffn_dim": 4 * hidden} | other
    return OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        init_std=hidden**-0.5,
        **sizes,
    )


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, **other: int) -> PreTrainedConfig:
    """Sizes of arXiv 2407.21783, table 3, with the vocabulary and context of the first Llama 3."""
    sizes: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192} | other
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=hidden**-0.5,
        **sizes,
    )


SHIPPED = {"demo": "target", "demo-draft": "draft"}
SMOLLM2 = "smollm2"
TRAINED = (*SHIPPED, SMOLLM2)
CONFIGS = {
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "llama-134m": lambda: _llama(576, 30, 9, 3, 1536, vocab_size=49152, tie_word_embeddings=True),
    "llama-0.5b": lambda: _llama(1024, 24, 16, 8, 4096, vocab_size=49152),
    "llama-3-8b": lambda: _llama(4096, 32, 32, 8, 14336),
    "tiny-gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=4096, initializer_range=64**-0.5),
    "tiny-opt": lambda: _opt(64, 2, 4, vocab_size=4096),
    "tiny-llama": lambda: _llama(64, 2, 4, 2, 128, vocab_size=4096, max_position_embeddings=2048),
}
NAMES = (*TRAINED, *CONFIGS)


def build(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    positions: int | None = None,
    layers: int | None = None,
) -> PreTrainedModel:
    """The model of that name, in eval mode and with SDPA attention.

    Random weights are drawn on `device`, the same every time there. Their standard deviation is 1/sqrt(hidden size),
    which keeps a layer's output near 1: with Hugging Face's 0.02 a small model repeats its last token for ever, since
    its embeddings, tied to the LM head, outweigh its layers. EOS ends no text of theirs.

    Args:
        name: one of `NAMES`.
        device: where the weights shall be.
        dtype: their type.
        positions: longest text, where the published one is too short.
        layers: how many, if not as many as were published.

    Raises:
        OptionError: there is no model of that name, it has trained weights and cannot be given more positions or other
            layers, or it is not shipped and what it comes from is not installed.
    """
    if name in TRAINED:
        if layers is not None:
            raise OptionError(f"{name} is trained: it keeps its layers")
        model = pretrained(smollm2() if name == SMOLLM2 else DEMO_MODEL / SHIPPED[name], device, dtype)
        if positions is not None and positions > model.config.max_position_embeddings:
            raise OptionError(
                f"{name} is trained for {model.config.max_position_embeddings} positions, not {positions}"
            )
        return model
    if name not in CONFIGS:
        raise OptionError(f"unknown model {name!r}; choose one of {', '.join(NAMES)}")
    config = CONFIGS[name]()
    if positions is not None:
        config.max_position_embeddings = max(positions, config.max_position_embeddings)
    if layers is not None:
        config.num_hidden_layers = layers
    return _random(config, torch.device(device), dtype)


def _random(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, the same every time."""
    generators = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(generators), device:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def pretrained(folder: Path, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers from a folder, in eval mode and with SDPA attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of its own: the first layers of a model, with its embedding, final norm and LM head."""
    config = copy.deepcopy(model.config)
    sizes = config.get_text_config()
    sizes.num_hidden_layers = count
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[:count]
    small = _random(config, model.device, model.dtype)
    small.load_state_dict(model.state_dict(), strict=False)  # but for the other layers
    return small


def prompts(name: str) -> list[list[int]]:
    """What a model of `NAMES` is asked to continue."""
    return prompts_for(smollm2() if name == SMOLLM2 else None)


def tokenizer_folder(name: str) -> Path:
    """Where the tokenizer of `prompts(name)` lies."""
    return smollm2() if name == SMOLLM2 else DEMO_MODEL / SHIPPED["demo"]


def prompts_for(model: Path | None = None) -> list[list[int]]:
    """`chat_prompts` for the folder of a model that has a chat template, `demo_prompts` for others and none."""
    is_chat = model is not None and AutoTokenizer.from_pretrained(model).chat_template is not None
    return chat_prompts(model) if model is not None and is_chat else demo_prompts(model)


def spread(values: Sequence[Value], count: int) -> list[Value]:
    """`count` of them, from all parts of the list; each several times where there are fewer."""
    return [values[index * len(values) // count] for index in range(count)]


def chat_prompts(model: Path) -> list[list[int]]:
    """Token ids of eight questions of four kinds, 40 to 250 tokens each, as the model's chat template has them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [prompt["text"] for prompt in json.loads(CHAT_PROMPTS.read_text())]
    chats = [[{"role": "user", "content": text}] for text in texts]
    ids: list[list[int]] = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    return ids


def demo_prompts(model: Path | None = None) -> list[list[int]]:
    """Token ids of the 32 shipped prompts, 41 to 349 tokens each: parts of modules that no demo model was trained on.

    Their ids are below 4096, which is in the vocabulary of every model here; or those of the tokenizer of another one.
    """
    tokenizer = AutoTokenizer.from_pretrained(model or DEMO_MODEL / "target")
    texts = [prompt["text"] for prompt in json.loads((DEMO_MODEL / "prompts.json").read_text())]
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    return ids
