"""Recognise an attention mask by evaluating it.

Models write their masks in many ways: buffers, comparisons of `arange`s, vmapped predicates, biases. What a mask
*means* is plain from what it computes, so it is computed for a short sequence and compared with the families the
kernels know: causal, causal with a sliding window, and either with an ALiBi bias (linear in the distance, one slope a
head; 2108.12409).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Probe = Callable[[int, Tensor, dict[int, int]], Tensor]
"""(tokens T, raw scores [H, T, T], literal replacements) -> attention probabilities [H, T, T]."""

_TOKENS = 24
_LONG = 1024
_SUBSTITUTES = (5, 9)


class UnknownMaskError(Exception):
    """The mask belongs to no known family; the message says why and shows it."""


@dataclass(frozen=True)
class MaskFamily:
    """Which keys a query sees, and the bias it adds.

    Attributes:
        window: 0, or the number of latest positions visible, the query's own included.
        alibi_slopes: None, or slope per head [H]: the bias is `slope * (key position - query position)`.
    """

    window: int = 0
    alibi_slopes: Tensor | None = None

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax of the scaled scores [H, T, T] under this mask and bias."""
        index = torch.arange(scores.shape[-1], device=scores.device)
        distance = index[:, None] - index[None, :]
        if self.alibi_slopes is not None:
            scores = scores - self.alibi_slopes[:, None, None] * distance
        return scores.masked_fill(~_visible(distance, self.window), -torch.inf).softmax(-1)


def recognise(
    probe: Probe,
    heads: int,
    longest: int,
    scale: float,
    softcap: float,
    literals: set[int],
    dtype: torch.dtype,
    device: torch.device,
) -> MaskFamily:
    """The family of the mask behind `probe`, tried on random scores over a short text and equal scores over a long one.

    Args:
        probe: computes the model's own attention probabilities.
        heads: number of query heads H.
        longest: tokens a row can hold: what the mask does to texts up to there (`_LONG` at most) is seen, however it is
            written. What it does beyond shows in `literals` only.
        scale: factor on the raw scores.
        softcap: 0, or c in `c * tanh(scaled / c)`.
        literals: integers that stand in the mask's subgraph; a window longer than the probed text is one of them.
        dtype: the model's dtype; decides how exactly probabilities must agree.
        device: where to evaluate.

    Raises:
        UnknownMaskError: not a known family.
    """
    window = _window(probe, heads, literals, device)
    slopes = _slopes(probe(_TOKENS, _zeros(heads, _TOKENS, device), {}), window, dtype)
    long = max(_TOKENS, min(longest, _LONG))
    if not window and slopes is None:
        window = _probe_window(probe, heads, long, {}, device)  # written in a table or a float, not in a literal
    family = MaskFamily(window, slopes)
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(heads, _TOKENS, _TOKENS, dtype=torch.float32, device=device, generator=generator) * 3
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    for raw in (scores, _zeros(heads, long, device)):
        scaled = raw * scale
        expected = family.probabilities(softcap * torch.tanh(scaled / softcap) if softcap else scaled)
        actual = probe(raw.shape[-1], raw, {}).float()
        if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
            raise UnknownMaskError(
                f"over {raw.shape[-1]} tokens the attention probabilities are not softmax(scale * scores + known mask)"
            )
    return family


def _visible(distance: Tensor, window: int) -> Tensor:
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _zeros(heads: int, tokens: int, device: torch.device) -> Tensor:
    return torch.zeros(heads, tokens, tokens, dtype=torch.float32, device=device)


def _window(probe: Probe, heads: int, literals: set[int], device: torch.device) -> int:
    """Window of the mask; a window longer than the probed text shows when its literal is replaced by a small one."""
    window = _probe_window(probe, heads, _TOKENS, {}, device)
    if window:
        return window
    found = set()
    for literal in sorted(n for n in literals if n >= _TOKENS):
        try:
            shifts = {
                value: _probe_window(probe, heads, _TOKENS, {literal: value}, device) - value for value in _SUBSTITUTES
            }
        except UnknownMaskError as error:
            raise UnknownMaskError(f"the literal {literal} shapes the mask in an unknown way: {error}") from error
        except (RuntimeError, IndexError):  # the literal is a size or an index, not a distance
            continue
        if all(shift == -value for value, shift in shifts.items()):
            continue  # no window appeared: the literal does not matter to the mask
        if len(set(shifts.values())) != 1:
            raise UnknownMaskError(f"the literal {literal} changes the mask, but not as a sliding window does")
        found.add(literal + next(iter(shifts.values())))
    return min(found, default=0)


def _probe_window(probe: Probe, heads: int, tokens: int, replace: dict[int, int], device: torch.device) -> int:
    """Window of the mask over `tokens` tokens; 0 if it is plainly causal there."""
    seen = probe(tokens, _zeros(heads, tokens, device), replace) > 0
    if not bool((seen == seen[:1]).all()):
        raise UnknownMaskError("heads see different tokens")
    index = torch.arange(tokens, device=device)
    distance = index[:, None] - index[None, :]
    width = int(seen[0].sum(-1).max())
    window = width if width < tokens else 0
    if not torch.equal(seen[0], _visible(distance, window)):
        raise UnknownMaskError(f"neither causal nor a sliding window; first rows (query x key):\n{_picture(seen[0])}")
    return window


def _picture(seen: Tensor) -> str:
    return "\n".join("".join("x" if cell else "." for cell in row) for row in seen[:12, :12].tolist())


def _slopes(uniform: Tensor, window: int, dtype: torch.dtype) -> Tensor | None:
    """ALiBi slopes [H] from probabilities [H, T, T] of all-zero scores; None if there is no bias."""
    logs = uniform.double().log()
    tokens = uniform.shape[-1]
    index = torch.arange(tokens, device=uniform.device)
    distance = index[:, None] - index[None, :]
    bias = logs - logs.diagonal(dim1=-2, dim2=-1)[..., None]
    reach = min(window or tokens, tokens) - 1
    if reach == 0:
        return None
    slopes = -bias[:, reach, 0] / reach
    exact = dtype in (torch.float32, torch.float64)
    if bool((slopes.abs() < (1e-6 if exact else 1e-3)).all()):
        slopes = torch.zeros_like(slopes)
    expected = -slopes[:, None, None] * distance
    error = ((bias - expected).abs() * _visible(distance, window)).nan_to_num(0.0).max()
    if error > (1e-4 if exact else 0.1):
        raise UnknownMaskError("the bias added to the scores is not linear in the distance (ALiBi)")
    return None if not bool(slopes.any()) else slopes.float()
