"""Block drafters as their papers write them: one row at a time, everything anew for each block, dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from emssd_compile.drafters import MarginalTree
from tests.drafters.plain_heads import Noise, mlp, part, rms, tapped, turned


@dataclass
class PlainBlock:
    """A head of random weights, and the Hugging Face model that it drafts for."""

    head: Any
    model: Any

    def __post_init__(self) -> None:
        self.config = self.head.config
        self.weights = {name: value.detach() for name, value in self.head.state_dict().items()}
        self.embedding = self.weights.get("embed_tokens.weight", self.model.model.embed_tokens.weight.detach())
        self.ids = self.weights.get("draft_ids", torch.arange(self.config.vocabulary))
        self.lm_head = self.weights.get("lm_head.weight", self.model.lm_head.weight.detach()[self.ids])

    def features(self, text: list[int]) -> Tensor:
        """c of each token, `[n, H]`."""
        outputs, _ = tapped(self.model, text, self.head.taps)
        return rms(torch.cat(outputs, 1) @ self.weights["fc.weight"].T, self.weights["hidden_norm.weight"])

    def hidden(self, text: list[int]) -> Tensor:
        """What comes out where there is to be a draft, `[D, H]`, behind a text whose last token is the root."""
        config, depth = self.config, self.head.max_depth
        size = depth if config.sample_from_anchor else depth + 1
        context = self.features(text)[:-1]  # [n - 1, H]
        mask = self.embedding[config.mask_token] if config.mask_token is not None else self.weights["mask_embedding"]
        x = torch.stack([self.embedding[text[-1]], *[mask] * (size - 1)])
        for index in range(config.num_layers):
            layer, is_sliding = part(self.weights, f"layers.{index}."), index in config.sliding_layers
            x = x + self.attention(
                part(layer, "self_attn."), context, rms(x, layer["input_layernorm.weight"]), is_sliding
            )
            x = x + mlp(part(layer, "mlp."), rms(x, layer["post_attention_layernorm.weight"]))
        return rms(x, self.weights["norm.weight"])[size - depth :]

    def attention(self, weights: dict[str, Tensor], context: Tensor, x: Tensor, is_sliding: bool) -> Tensor:
        """Of the block `x[b, H]`, to the context and to itself."""
        sizes, first = self.config.layer, len(context)
        both = torch.cat([context, x])  # [L, H]

        def heads(kind: str) -> Tensor:
            found = (both @ weights[f"{kind}_proj.weight"].T).view(len(both), -1, sizes.head_size)
            if kind != "v" and sizes.has_head_norms:
                found = rms(found, weights[f"{kind}_norm.weight"])
            return found if kind == "v" else turned(found, sizes.rotary.theta)

        q, k, v = heads("q")[first:], heads("k"), heads("v")
        k, v = (each.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / sizes.head_size**0.5
        for query in range(len(x)):
            for key in range(len(both)):
                if is_sliding and key <= first + query - self.config.sliding_window:
                    scores[:, query, key] = -torch.inf
                if is_sliding and self.config.sliding_is_causal and key > first + query:
                    scores[:, query, key] = -torch.inf
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ weights["o_proj.weight"].T

    def logits(self, text: list[int], tokens: list[int]) -> list[Tensor]:
        """Of each draft, `[Vd]`, when the drafts before are `tokens`; as many as these, and one more."""
        hidden, weights, state = (
            self.hidden(text),
            part(self.weights, "markov_head."),
            torch.zeros(self.config.markov_rank),
        )
        found = []
        for h, before in zip(hidden, [text[-1], *tokens], strict=False):
            logits = self.lm_head @ h
            if self.config.markov_rank:
                e = weights["markov_w1.weight"][before]
                added, state = _MARKOV[self.config.markov_head](weights, h, e, state)
                logits = logits + weights["markov_w2.weight"] @ added
            found.append(logits)
        return found

    def confidence(self, text: list[int], tokens: list[int]) -> list[float]:
        """That in each of the drafts `tokens`."""
        weights, found = part(self.weights, "confidence_head.proj."), []
        for h, before in zip(self.hidden(text), [text[-1], *tokens], strict=False):
            e = self.weights["markov_head.markov_w1.weight"][before] if self.config.confidence_reads_token else h[:0]
            found.append(float(torch.sigmoid(weights["weight"][0] @ torch.cat([h, e]) + weights["bias"][0])))
        return found

    def trusted(self, text: list[int], tokens: list[int]) -> int:
        """How many drafts come before the first that the confidence head has too little confidence in."""
        threshold = self.head.confidence_threshold
        if threshold is None:
            return self.head.max_depth
        return next(
            (index for index, each in enumerate(self.confidence(text, tokens)) if each < threshold), len(tokens)
        )

    def chain(self, text: list[int], count: int, shape: Callable[[Tensor], Tensor], noise: Noise) -> list[int]:
        """The likeliest token of each place."""
        drafts: list[int] = []
        for _ in range(self.head.max_depth):
            drafts.append(int(self.ids[self.log_q(text, drafts, shape, noise).argmax()]))
        return drafts[: min(count, self.trusted(text, drafts))]

    def tree(
        self, text: list[int], tree: MarginalTree, depth: int, shape: Callable[[Tensor], Tensor], noise: Noise
    ) -> list[list[int]]:
        """The likeliest of all paths, level by level, the likeliest first."""
        depth = min(depth, self.head.max_depth, self.trusted(text, [0] * self.head.max_depth))
        ranked = []
        for level in range(depth):
            values, places = self.log_q(text, [0] * level, shape, noise).topk(tree.width)
            ranked.append(list(zip(values.tolist(), self.ids[places].tolist(), strict=True)))
        paths = [path for length in range(1, depth + 1) for path in product(*ranked[:length])]
        scored = sorted(((sum(value for value, _ in path), path) for path in paths), key=lambda each: -each[0])
        kept = sorted(scored[: tree.nodes], key=lambda each: (len(each[1]), -each[0]))
        return [[token for _, token in path] for _, path in kept]

    def log_q(self, text: list[int], path: list[int], shape: Callable[[Tensor], Tensor], noise: Noise) -> Tensor:
        """Log-probabilities of the tokens in `ids` behind the path."""
        added = noise(len(text) + len(path))
        logits = shape(self.logits(text, path)[len(path)])
        return (logits + (added[self.ids] if isinstance(added, Tensor) else added)).log_softmax(-1)


def _vanilla(weights: dict[str, Tensor], h: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return e, s


def _gated(weights: dict[str, Tensor], h: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(weights["gate_proj.weight"] @ torch.cat([h, e]) + weights["gate_proj.bias"])
    return gate * e, s


def _rnn(weights: dict[str, Tensor], h: Tensor, e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    joint = weights["joint_proj.weight"] @ torch.cat([s, e, h]) + weights["joint_proj.bias"]
    rank = len(e)
    g, c, o = torch.sigmoid(joint[:rank]), torch.tanh(joint[rank : 2 * rank]), torch.tanh(joint[2 * rank :])
    return o, g * s + (1 - g) * c


_MARKOV = {"vanilla": _vanilla, "gated": _gated, "rnn": _rnn}
