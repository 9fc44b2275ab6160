"""Recognise an attention mask by evaluating it.

Models write their masks in many ways: buffers, comparisons of `arange`s, vmapped predicates, biases. What a mask
*means* is plain from what it computes, so it is computed at chosen places of the longest row that there can be, its
end among them, and compared with the families that the kernels know: causal, causal with a sliding window or in
chunks, and any of them with an ALiBi bias (linear in the distance, one slope a head; 2108.12409).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emssd_compile.precision import Precision

Probe = Callable[[Tensor, Tensor], Tensor]
"""(places [n] in a row, raw scores [H, n, n] of those tokens) -> attention probabilities [H, n, n] among them."""

_SHORT = 24
_MOST_PLACES = 2048
_ELEMENTS = 2**22
"""Elements of the probabilities of one evaluation: with H heads, sqrt(_ELEMENTS / H) places are looked at at once."""


class UnknownMaskError(Exception):
    """The mask belongs to no known family; the message says why and shows it."""


@dataclass(frozen=True)
class MaskFamily:
    """Which keys a query sees, and the bias it adds.

    Attributes:
        window: 0, or the number of latest positions visible, the query's own included.
        chunk: 0, or n: a query sees keys of its own chunk of n positions only, `query // n == key // n`.
        alibi_slopes: None, or slope per head [H]: the bias is `slope * (key position - query position)`.
        probed: positions among which the mask was compared with the family, 0 if it was not.
        longest: tokens of the row that they lie in.
    """

    window: int = 0
    alibi_slopes: Tensor | None = None
    chunk: int = 0
    probed: int = 0
    longest: int = 0

    def probabilities(self, scores: Tensor, places: Tensor | None = None) -> Tensor:
        """Softmax of the scaled scores [H, n, n] under this mask and bias, for tokens at `places` [n]: 0, 1, 2, ..."""
        if places is None:
            places = torch.arange(scores.shape[-1], device=scores.device)
        if self.alibi_slopes is not None:
            scores = scores - self.alibi_slopes[:, None, None] * (places[:, None] - places)
        return scores.masked_fill(~self.visible(places), -torch.inf).softmax(-1)

    def visible(self, places: Tensor) -> Tensor:
        """Which keys the queries see, bool [n, n] (query x key), for tokens at `places` [n]."""
        distance = places[:, None] - places
        seen = distance >= 0
        if self.window:
            seen &= distance < self.window
        if self.chunk:
            seen &= places[:, None] // self.chunk == places // self.chunk
        return seen


@dataclass(frozen=True)
class ProbedAttention:
    """An attention whose mask is not known yet.

    Attributes:
        probe: computes the model's own attention probabilities.
        heads: number of query heads H.
        scale: factor on the raw scores.
        softcap: 0, or c in `c * tanh(scaled / c)`.
        dtype: the coarsest dtype on the way; decides how exactly probabilities must agree.
        device: where to evaluate.
    """

    probe: Probe
    heads: int
    scale: float
    softcap: float
    dtype: torch.dtype
    device: torch.device


def recognise(attention: ProbedAttention, longest: int) -> MaskFamily:
    """The family of an attention's mask: equal to it among places of a row of `longest` tokens, its end included.

    All places of the row are compared if they are few enough (1,024 with 4 heads, 362 with 32), else its
    beginning, its end, some between, and those around every edge of a window or chunk.

    Args:
        attention: to be probed.
        longest: tokens a row can hold.

    Raises:
        UnknownMaskError: not a known family.
    """
    return _Recogniser(attention, longest).family()


class _Recogniser:
    """What `recognise` asks of the probe, step by step."""

    def __init__(self, attention: ProbedAttention, longest: int) -> None:
        self.attention, self.longest = attention, longest
        self.heads, self.device = attention.heads, attention.device
        self.exact = attention.dtype in (torch.float32, torch.float64)
        self.rounding = 1e-5 if self.exact else 8 * torch.finfo(attention.dtype).eps
        self.slopes: Tensor | None = None

    def family(self) -> MaskFamily:
        places = self._places()
        short = self._range(0, min(_SHORT, self.longest))
        self.slopes = self._slopes(short)
        weights = self._flat_weights(places)
        found = self._match(places, self._seen(places, weights))
        edges = self._edges(found, places)
        if len(edges) > len(places):
            places, weights = edges, self._flat_weights(edges)
            seen = self._seen(places, weights)
            if not self._agrees(found, places, seen):
                raise UnknownMaskError(self._describe(places, seen))
        self._compare_weights(found, places, weights)
        self._compare_scores(found, short)
        self._compare_scores(found, self._range(max(0, self.longest - _SHORT), self.longest))
        return MaskFamily(found.window, self.slopes, found.chunk, len(places), self.longest)

    def _range(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def _room(self) -> int:
        return max(_SHORT, min(_MOST_PLACES, int((_ELEMENTS / self.heads) ** 0.5)))

    def _places(self) -> Tensor:
        """All places of the longest row; or its beginning, its end and some between."""
        room = self._room()
        if self.longest <= room:
            return self._range(0, self.longest)
        quarter = room // 4
        between = torch.linspace(0, self.longest - 1, quarter, dtype=torch.float64, device=self.device).long()
        parts = [self._range(0, quarter), between, self._range(self.longest - quarter, self.longest)]
        places: Tensor = torch.cat(parts).unique()
        return places

    def _distance(self, places: Tensor) -> Tensor:
        return places[:, None] - places

    def _flattening(self, places: Tensor) -> Tensor:
        """Raw scores [H, n, n] that cancel the bias."""
        zeros = torch.zeros(self.heads, len(places), len(places), dtype=torch.float32, device=self.device)
        return (
            zeros if self.slopes is None else self.slopes[:, None, None] * self._distance(places) / self.attention.scale
        )

    def _telling(self, places: Tensor) -> Tensor:
        """Where [H, n, n] a weight of 0 means "not seen": not where rounding of a large bias alone could make it 0."""
        if self.slopes is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=self.device)
        bias = self.slopes[:, None, None].abs() * self._distance(places).abs()
        return bias * self.rounding < 30

    def _flat_weights(self, places: Tensor) -> Tensor:
        """Probabilities [H, n, n] where all that is seen weighs the same."""
        return self.attention.probe(places, self._flattening(places)).float()

    def _seen(self, places: Tensor, weights: Tensor) -> Tensor:
        """Which keys the queries see, bool [n, n]: the same for all heads."""
        positive, telling = weights > 0, self._telling(places)
        seen = (positive & telling).any(0)
        if not bool(((positive == seen) | ~telling).all()):
            raise UnknownMaskError("heads see different tokens")
        return seen

    def _agrees(self, family: MaskFamily, places: Tensor, seen: Tensor) -> bool:
        return bool(((family.visible(places) == seen) | ~self._telling(places).any(0)).all())

    def _match(self, places: Tensor, seen: Tensor) -> MaskFamily:
        """The family that agrees with what is seen."""
        candidates = [MaskFamily()]
        if not self._agrees(candidates[0], places, seen):
            last = self.longest - 1
            first = self._first_seen(last, places, seen)
            candidates = [MaskFamily(window=last - first + 1)]
            if first > 0:
                candidates.append(MaskFamily(chunk=first - self._first_seen(first - 1, places, seen)))
        for family in candidates:
            if self._agrees(family, places, seen):
                return family
        raise UnknownMaskError(self._describe(places, seen))

    def _first_seen(self, query: int, places: Tensor, seen: Tensor) -> int:
        """The first key that a query sees, if it sees all from there on; found by bisection."""
        if len(places) == self.longest:
            return int(seen[query].int().argmax())
        low, high = -1, query  # key `low` is not seen, key `high` is
        while high - low > 1:
            keys = torch.linspace(low + 1, high, 64, dtype=torch.float64, device=self.device).long()
            keys = torch.cat([keys, keys.new_tensor([query])]).unique()
            row = self._seen(keys, self._flat_weights(keys))[-1]
            if not bool(row[-1]):
                return query
            at = int(row.int().argmax())
            low, high = (int(keys[at - 1]) if at else low, int(keys[at]))
            if at == 0:
                break
        return high

    def _edges(self, family: MaskFamily, places: Tensor) -> Tensor:
        """`places`, and those around the edges of the family's window or chunks."""
        width = family.window or family.chunk
        if not width or len(places) == self.longest:
            return places
        around = torch.arange(-2, 3, device=self.device)
        if family.window:
            queries = torch.linspace(width, self.longest - 1, 8, dtype=torch.float64, device=self.device).long()
            edges = torch.cat([queries, queries - width])
        else:
            edges = torch.linspace(1, self.longest // width, 16, dtype=torch.float64, device=self.device).long() * width
        found = (edges[:, None] + around).flatten()
        both: Tensor = torch.cat([places, found[(found >= 0) & (found < self.longest)]]).unique()
        return both

    def _slopes(self, short: Tensor) -> Tensor | None:
        """ALiBi slopes [H] of the bias over the first tokens; None if there is none."""
        tokens = len(short)
        with Precision(torch.float32):  # a slope is a number, not what half precision makes of its products
            uniform = self.attention.probe(
                short,
                torch.zeros(self.heads, tokens, tokens, dtype=torch.float32, device=self.device),
            )
        seen = uniform > 0
        if not bool(seen.diagonal(dim1=-2, dim2=-1).all()):
            return None  # a query that does not even see itself: no family
        bias = uniform.double().log()
        bias = bias - bias.diagonal(dim1=-2, dim2=-1)[..., None]
        distance = self._distance(short)
        # The farthest key that is seen: where the bias is largest beside its rounding.
        reach = int(torch.where(seen.all(0) & (distance >= 0), distance, 0).max())
        if reach == 0:
            return None
        where = (distance == reach) & seen.all(0)
        slopes = -bias[:, where].mean(-1) / reach
        if bool((slopes.abs() < (1e-6 if self.exact else 1e-3)).all()):
            slopes = torch.zeros_like(slopes)
        expected = -slopes[:, None, None] * distance
        error = ((bias - expected).abs() * (seen & (distance >= 0))).nan_to_num(0.0).max()
        if error > (1e-4 if self.exact else 0.1):
            raise UnknownMaskError("the bias added to the scores is not linear in the distance (ALiBi)")
        return None if not bool(slopes.any()) else slopes.float()

    def _compare_weights(self, family: MaskFamily, places: Tensor, weights: Tensor) -> None:
        """All that a query sees weighs as much as itself: each weight by itself, however small beside the sum."""
        logs = weights.log()
        ratio = (logs - logs.diagonal(dim1=-2, dim2=-1)[..., None]).abs()
        bias = 0.0 if self.slopes is None else self.slopes[:, None, None].abs() * self._distance(places)
        wrong = ~(ratio <= self.rounding * (1 + bias)) & family.visible(places) & self._telling(places)
        if bool(wrong.any()):
            query = int(places[int(wrong.nonzero()[0, 1])])
            raise UnknownMaskError(
                f"over {self.longest} tokens the query at position {query} adds a bias to scores that is neither 0 nor "
                "linear in the distance (ALiBi)"
            )

    def _compare_scores(self, family: MaskFamily, places: Tensor) -> None:
        """Random scores give the probabilities of the family: scale, cap and bias are right."""
        generator = torch.Generator(self.device).manual_seed(0)
        raw = (
            torch.randn(
                self.heads,
                len(places),
                len(places),
                dtype=torch.float32,
                device=self.device,
                generator=generator,
            )
            * 3
        )
        scaled = raw * self.attention.scale
        if self.attention.softcap:
            scaled = self.attention.softcap * torch.tanh(scaled / self.attention.softcap)
        expected = MaskFamily(family.window, self.slopes, family.chunk).probabilities(scaled, places)
        actual = self.attention.probe(places, raw).float()
        tolerance = 1e-5 if self.exact else 2e-2
        if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
            raise UnknownMaskError(
                f"over {self.longest} tokens the attention probabilities are not softmax(scale * scores + known mask)"
            )

    def _describe(self, places: Tensor, seen: Tensor) -> str:
        """Why no family fits, with the corner of the mask where it first leaves the causal one."""
        causal = MaskFamily().visible(places)
        telling = self._telling(places).any(0)
        query, key = (int(i) for i in ((seen != causal) & telling).nonzero()[0])
        rows = slice(max(0, query - 5), query + 6)
        columns = slice(max(0, min(key, query) - 3), max(0, min(key, query) - 3) + 12)
        corner = seen[rows, columns].tolist()
        picture = "\n".join("".join("x" if cell else "." for cell in row) for row in corner)
        return (
            "neither causal nor a sliding window nor causal in chunks; keys (columns, from position "
            f"{int(places[columns][0])}) that queries (rows, from position {int(places[rows][0])}) see:\n{picture}"
        )
