"""The models that must come out exact, and the reference that says what exact is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import POSITIONS, VOCABULARY, toy_model

HUGGING_FACE = (
    *("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma"),
    *("bloom", "mpt", "falcon", "starcoder2", "olmo2"),
)
WIDTH, HEADS = 32, 4


class OwnPositions(nn.Module):
    """A decoder that makes its own positions and its own mask, and slices its learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Parameter(torch.empty(POSITIONS, WIDTH))
        self.distance = nn.Embedding(POSITIONS, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        positions = torch.arange(tokens, device=ids.device)
        x = self.wte(ids) + self.wpe[:tokens] + self.distance(positions)
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(positions[None, :] > positions[:, None], float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(x + self.mlp(x))


class LastLogits(nn.Module):
    """A decoder in nanoGPT's manner: one projection for q, k and v, a tril buffer, logits of the last position only."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(POSITIONS, POSITIONS))[None, None])
        self.bias: Tensor
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        batch, tokens = ids.size()
        x = self.wte(ids) + self.wpe(torch.arange(0, tokens, dtype=torch.long, device=ids.device))
        q, k, v = (
            part.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.c_attn(self.norm(x)).split(WIDTH, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        scores = scores.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, float("-inf"))
        x = x + self.c_proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(batch, tokens, WIDTH))
        return self.lm_head(x[:, [-1], :]), None


PLAIN: dict[str, type[nn.Module]] = {"own-positions": OwnPositions, "last-logits": LastLogits}
ARCHITECTURES = (*HUGGING_FACE, *PLAIN)


@torch.no_grad()
def build(architecture: str, **overrides: Any) -> nn.Module:
    """A tiny random model, in fp32 and eval mode, whose text depends on all of its context.

    `overrides` are fields of its configuration.

    Layers are louder and embeddings quieter than in `tests.zoo`: where logits share the weights of the embedding, a
    model would else go on repeating one token, and a mistake in its attention would not show in the text.
    """
    if architecture in PLAIN:
        torch.manual_seed(1)
        plain = PLAIN[architecture]().eval()
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.6)
        return plain
    model = toy_model(architecture, **overrides)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter is not embedding and parameter is not head:
            parameter.mul_(2.0)
    embedding.mul_(0.3)
    return model


def prompt(length: int) -> list[int]:
    """The prompt of `length` tokens: begins with its length, so that no prompt begins another; repeats n-grams."""
    alphabet = torch.randint(2, VOCABULARY, (5,), generator=torch.Generator().manual_seed(length))
    picks = torch.randint(5, (length - 1,), generator=torch.Generator().manual_seed(length))
    return [length, *alphabet[picks].tolist()]


class Reference:
    """Greedy decoding written to be obvious: one prompt, one token at a time, a full forward for each, no cache.

    Args:
        model: maps `ids[1, T]` to logits, in any of the ways `emssd_compile.optimize` takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._texts: dict[tuple[int, ...], int] = {}

    def __call__(
        self, ids: Sequence[int], max_new_tokens: int, eos: Collection[int] = (), min_new_tokens: int = 0
    ) -> list[int]:
        """The new tokens."""
        text = list(ids)
        for index in range(max_new_tokens):
            barred = frozenset(eos) if index < min_new_tokens else frozenset()
            text.append(self._next(tuple(text), barred))
            if text[-1] in eos:
                break
        return text[len(ids) :]

    def _next(self, text: tuple[int, ...], barred: frozenset[int]) -> int:
        if not barred and text in self._texts:
            return self._texts[text]
        with torch.no_grad():
            output = self.model(torch.tensor([text]))
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        choice = logits[0, -1].clone()
        choice[list(barred)] = -torch.inf
        token = int(choice.argmax())
        if not barred:
            self._texts[text] = token
        return token
