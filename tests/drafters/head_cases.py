"""What the tests of several draft heads have in common: targets, whole steps, checkpoint files, rows that sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import emssd_compile
from emssd_compile.drafters import DraftContext
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.step.randomness import gumbels
from tests.drafters.contexts import context
from tests.passes.graphs import HIDDEN, VOCABULARY, TinyModel, causal

TEXTS = [[3, 1, 4], [9], [2, 6, 5, 3, 5, 8, 9, 7, 1, 1, 2]]
GREEDY: dict[str, Any] = {}
SAMPLING: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 0.8, "top_k": [3, 0, 2]}
SEEDS, TOP_K = (5, 6, 7), (3, 0, 2)
SAMPLES = (True, True, False)


def target() -> TinyModel:
    """A small model that is loud enough to wander through its vocabulary, and now and then repeats a token."""
    torch.manual_seed(0)
    model = TinyModel(attend=causal, kv_heads=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        model.embed.weight.mul_(0.6).add_(torch.randn(HIDDEN))
    return model


def fast(model: nn.Module, drafter: Any, **options: Any) -> OptimizedModel:
    """It is decoded with a drafter."""
    sizes = {"max_batch": 2, "max_length": 48, "backend": "eager", "layout": "packed"}
    return emssd_compile.optimize(model, drafter, **{**sizes, **options})


def seen(limit: int, sampling: bool) -> DraftContext:
    """What a drafter sees of `TEXTS`: with sampling the first two rows sample, each with a top-k of its own."""
    torch.manual_seed(1)
    hidden = torch.randn(len(TEXTS), HIDDEN)
    found = replace(context(TEXTS, limit), hidden=hidden, seeds=torch.tensor(SEEDS), vocabulary=VOCABULARY)
    if not sampling:
        return found
    options = {"do_sample": torch.tensor(SAMPLES), "temperature": torch.tensor([0.8, 0.8, 1.0])}
    options |= {"top_k": torch.tensor([*TOP_K[:2], 0]), "top_p": torch.ones(len(TEXTS))}
    return replace(found, options=options)


def ranked(logits: Tensor, found: DraftContext, row: int, depth: int) -> tuple[list[int], Tensor]:
    """The tokens to draft behind a node of a depth, the best first, and q `[V]`, one row written out."""
    if not found.options:
        return logits.argsort(descending=True).tolist(), logits.softmax(0)
    logits = logits / found.options["temperature"][row]
    if top_k := int(found.options["top_k"][row]):
        logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
    noise = gumbels(found.seeds[row], found.known[row] + depth, torch.arange(len(logits)))
    scores = logits + noise if found.options["do_sample"][row] else logits
    return scores.argsort(descending=True, stable=True).tolist(), logits.softmax(0)


def grade(probability: Tensor) -> int:
    """A probability in eighths."""
    return min(int(8 * probability), 7)


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A checkpoint. What is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    save_file({name: v.clone() for name, v in weights.items() if v is not None}, folder / "model.safetensors")
    return folder


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple) else [made]:
            self.elements = max(self.elements, each.numel() if isinstance(each, Tensor) else 0)
        return made


def in_speculators(kind: str, config: dict[str, Any], **method: Any) -> dict[str, Any]:
    """The entries of a config within those of vllm-project/speculators, for a chain of two drafts."""
    proposed = {"proposal_type": "greedy", "speculative_tokens": 2, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    verifier = {"name_or_path": "some/model", "architectures": ["LlamaForCausalLM"]}
    return {
        **{name: value for name, value in config.items() if name != "model_type"},
        "speculators_model_type": kind,
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [{**proposed, **method}],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
    }
