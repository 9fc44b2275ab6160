"""Draft heads as their papers write them: one row at a time, everything anew for each draft, dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.drafters.dynamic_tree import DynamicTree

Noise = Callable[[int], Tensor | float]
"""Position of a token -> what is added to the logits of q there, `[V]`, or 0."""


def rms(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    """`x / rms(x) * weight`."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turned(heads: Tensor, theta: float, share: float = 1.0) -> Tensor:
    """`heads[L, n, D]` at positions 0, 1, ...: pairs (i, i + D / 2) as complex numbers, turned; of a share of D."""
    if share < 1:
        first, others = heads.split([int(heads.shape[2] * share), heads.shape[2] - int(heads.shape[2] * share)], 2)
        return torch.cat([turned(first, theta), others], 2)
    length, _, size = heads.shape
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)  # [L, D / 2]
    numbers = torch.complex(heads[..., : size // 2], heads[..., size // 2 :]) * torch.polar(
        torch.ones(angles.shape), angles
    ).unsqueeze(1)
    return torch.cat([numbers.real, numbers.imag], -1)


def attention(weights: dict[str, Tensor], x: Tensor, sizes: Any) -> Tensor:
    """Causal attention of `x[L, width]` with itself."""

    def heads(kind: str) -> Tensor:
        projected = F.linear(x, weights[f"{kind}_proj.weight"], weights.get(f"{kind}_proj.bias"))
        return projected.view(len(x), -1, sizes.head_size)

    q, k, v = heads("q"), heads("k"), heads("v")
    if sizes.is_gated:  # each head's queries, and behind them its gate
        q, gate = q[:, ::2], q[:, 1::2]
    if sizes.has_head_norms:
        q, k = rms(q, weights["q_norm.weight"]), rms(k, weights["k_norm.weight"])
    q, k = (turned(each, sizes.rotary.theta, sizes.rotary.share) for each in (q, k))
    k, v = (each.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / sizes.head_size**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -torch.inf)
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    if sizes.is_gated:
        attended = attended / (1 + (-gate).exp())
    attended = attended.flatten(1)
    return F.linear(attended, weights["o_proj.weight"], weights.get("o_proj.bias"))


def mlp(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The gated MLP."""
    gate, up, down = (weights[f"{kind}_proj.weight"] for kind in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@dataclass
class PlainHead:
    """What a head is made of, as functions of whole sequences of pairs.

    Attributes:
        features: of the target, `[n - 1, H]`, for the text's n tokens but the last.
        outputs: `[L, H]` of pairs of tokens and features.
        next_features: the head's own, of outputs.
        logits: of outputs.
        ids: tokens that can be drafted.
    """

    features: Callable[[list[int]], Tensor]
    outputs: Callable[[list[int], Tensor], Tensor]
    next_features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    ids: Tensor

    def output(self, text: list[int], path: list[int]) -> Tensor:
        """What the head gives where it predicts the token behind a text and drafts behind it."""
        features = self.features(text)
        for end in range(len(path) + 1):
            outputs = self.outputs([*text[1:], *path[:end]], features)
            features = torch.cat([features, self.next_features(outputs[-1:])])
        return outputs[-1]

    def log_q(self, text: list[int], path: list[int], shape: Callable[[Tensor], Tensor], noise: Noise) -> Tensor:
        """Log-probabilities of the tokens in `ids` there."""
        logits = shape(self.logits(self.output(text, path)).float())
        added = noise(len(text) + len(path))
        return (logits + (added[self.ids] if isinstance(added, Tensor) else added)).log_softmax(-1)

    def chain(self, text: list[int], count: int, shape: Callable[[Tensor], Tensor], noise: Noise) -> list[int]:
        """The likeliest token behind the likeliest token, and so on."""
        drafts: list[int] = []
        for _ in range(count):
            drafts.append(int(self.ids[self.log_q(text, drafts, shape, noise).argmax()]))
        return drafts

    def tree(
        self, text: list[int], tree: DynamicTree, depth: int, shape: Callable[[Tensor], Tensor], noise: Noise
    ) -> list[list[int]]:
        """The paths of EAGLE-2's tree of at most that depth, in the order in which nodes are made."""
        beam: list[tuple[float, list[int]]] = [(0.0, [])]
        made: list[tuple[float, list[int]]] = []
        for _ in range(min(depth, tree.depth)):
            level = []
            for score, path in beam:
                values, places = self.log_q(text, path, shape, noise).topk(tree.width)
                pairs = zip(values.tolist(), self.ids[places].tolist(), strict=True)
                level += [(score + value, [*path, token]) for value, token in pairs]
            made += level
            beam = sorted(level, key=lambda each: -each[0])[: tree.width]
        kept = sorted(range(len(made)), key=lambda index: -made[index][0])[: tree.nodes]
        return [made[index][1] for index in sorted(kept)]


def tapped(model: Any, text: list[int], taps: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Outputs of layers of a Hugging Face model, and its last hidden states, `[n, Ht]` each."""
    seen: dict[int, Tensor] = {}
    inner = model.model
    hooks = [
        inner.layers[tap].register_forward_hook(lambda _, __, result, tap=tap: seen.__setitem__(tap, result))
        for tap in set(taps)
    ]
    with torch.no_grad():
        hidden = inner(torch.tensor([text])).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    results = [seen[tap] if isinstance(seen[tap], Tensor) else seen[tap][0] for tap in taps]
    return [result.view(len(text), -1) for result in results], hidden


def projected(head: Any, outputs: list[Tensor]) -> Tensor:
    """EAGLE-3's features, of the outputs of layers."""
    weights = {name: value.detach() for name, value in head.state_dict().items()}
    if head.config.normalises_taps:
        outputs = [rms(each, weights[f"fc_norm.{index}.weight"]) for index, each in enumerate(outputs)]
    joined = torch.cat(outputs, 1)
    if head.config.normalises_features:
        joined = rms(joined, weights["input_norm.weight"])
    return joined @ weights["fc.weight"].T


class PlainParallelHead(PlainHead):
    """P-EAGLE: in the place of drafts there are masks."""

    mask: tuple[int, Tensor]

    def output(self, text: list[int], path: list[int]) -> Tensor:
        """What the head gives as many masks behind a text."""
        token, features = self.mask
        masked = torch.cat([self.features(text), *(features for _ in path)])
        return self.outputs([*text[1:], *(token for _ in path)], masked)[-1]


def plain_parallel_eagle(head: Any, model: Any) -> PlainParallelHead:
    """P-EAGLE, of the head's weights and configuration."""
    plain = PlainParallelHead(**vars(plain_eagle3(head, model)))
    stand_ins = head.state_dict()["mask_hidden"].view(head.config.num_taps, 1, -1)
    plain.mask = head.config.mask_token, projected(head, list(stand_ins))
    return plain


def plain_eagle3(head: Any, model: Any) -> PlainHead:
    """EAGLE-3, of the head's weights and configuration."""
    config, weights = head.config, {name: value.detach() for name, value in head.state_dict().items()}
    sizes = config.layer
    embedding = weights.get("embed_tokens.weight", model.model.embed_tokens.weight.detach())
    ids = weights.get("draft_ids", torch.arange(config.vocabulary))
    lm_head = weights.get("lm_head.weight", model.lm_head.weight.detach()[ids])

    def features(text: list[int]) -> Tensor:
        return projected(head, [output[:-1] for output in tapped(model, text, head.taps)[0]])

    def outputs(tokens: list[int], g: Tensor) -> Tensor:
        layer = part(weights, "layers.0.")
        normalised = rms(g, layer["hidden_norm.weight"])
        x = torch.cat([rms(embedding[tokens], layer["input_layernorm.weight"]), normalised], 1)
        y = (normalised if config.adds_normalised else g) + attention(part(layer, "self_attn."), x, sizes)
        y = y + mlp(part(layer, "mlp."), rms(y, layer["post_attention_layernorm.weight"]))
        for index in range(1, config.num_layers):
            layer = part(weights, f"layers.{index}.")
            y = y + attention(part(layer, "self_attn."), rms(y, layer["input_layernorm.weight"]), sizes)
            y = y + mlp(part(layer, "mlp."), rms(y, layer["post_attention_layernorm.weight"]))
        return y

    def normalised(y: Tensor) -> Tensor:
        return rms(y, weights["norm.weight"])

    return PlainHead(
        features,
        outputs,
        normalised if config.feeds_on_normalised else lambda y: y,
        lambda y: normalised(y) @ lm_head.T,
        ids,
    )


@dataclass
class PlainModules(PlainHead):
    """Multi-token prediction by several modules: module k predicts the k-th token, of what module k - 1 made of all."""

    modules: list[PlainHead] = field(default_factory=list)

    def output(self, text: list[int], path: list[int]) -> Tensor:
        """What the module gives that predicts the token behind a text and drafts."""
        features, tokens = self.features(text), [*text, *path]  # [n - 1, H]
        for k, module in enumerate(self.modules[: len(path) + 1], 1):
            outputs = module.outputs(tokens[k : k + len(features)], features)
            features = module.next_features(outputs)
        return outputs[-1]

    def log_q(self, text: list[int], path: list[int], shape: Callable[[Tensor], Tensor], noise: Noise) -> Tensor:
        """By the norm of that module."""
        self.logits = self.modules[len(path)].logits
        return super().log_q(text, path, shape, noise)


def plain_modules(head: Any, model: Any) -> PlainModules:
    """Multi-token prediction by as many modules as there are drafts."""
    modules = [plain_mtp(head, model, number) for number in range(head.num_draft_tokens)]
    return PlainModules(**vars(modules[0]), modules=modules)


def plain_mtp(head: Any, model: Any, module: int = 0) -> PlainHead:
    """Multi-token prediction by one module, of its weights and the model's tables."""
    weights = {name: value.detach() for name, value in head.state_dict().items()}
    weights = part(weights, f"mtp_layers.{module}.")
    layer, sizes, embedding = part(weights, "layer."), head.config.layer, model.model.embed_tokens.weight.detach()

    def features(text: list[int]) -> Tensor:
        (before,), hidden = tapped(model, text, (-1,))
        return (hidden if head.reads_normalised else before)[:-1]

    def outputs(tokens: list[int], h: Tensor) -> Tensor:
        pair = rms(embedding[tokens], weights["token_layernorm.weight"]), rms(h, weights["hidden_layernorm.weight"])
        x = torch.cat(pair, 1) @ weights["input_proj.weight"].T
        x = x + attention(part(layer, "self_attn."), rms(x, layer["input_layernorm.weight"]), sizes)
        return x + mlp(part(layer, "mlp."), rms(x, layer["post_attention_layernorm.weight"]))

    def normalised(y: Tensor) -> Tensor:
        return rms(y, weights["final_layernorm.weight"])

    return PlainHead(
        features,
        outputs,
        normalised if head.reads_normalised else lambda y: y,
        lambda y: normalised(y) @ model.lm_head.weight.detach().T,
        torch.arange(len(embedding)),
    )
