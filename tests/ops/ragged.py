"""Ragged batches for the tests of the ops, and attention over them written to be obvious."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emssd_compile import ops


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 32
    value_size: int = 32


@dataclass(frozen=True)
class Batch:
    """The arguments of `emssd::ragged_attention`; what no token has written in the caches is NaN."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    offsets: Tensor
    lengths: Tensor
    positions: Tensor
    options: dict[str, object] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.offsets, self.lengths, self.positions

    def with_options(self, **options: object) -> "Batch":
        return replace(self, options={**self.options, **options})


def make_batch(
    rows: list[tuple[int, int]],
    heads: Heads = Heads(),
    *,
    tail: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """A batch with ``rows[b] = (committed tokens, new tokens)`` and ``tail`` inert tokens, filled at random."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    capacity = max(length + count for length, count in rows) + 3
    k_cache = torch.full((len(rows), capacity, heads.num_kv_heads, heads.head_size), math.nan, dtype=dtype)
    v_cache = torch.full((len(rows), capacity, heads.num_kv_heads, heads.value_size), math.nan, dtype=dtype)
    for row, (length, count) in enumerate(rows):
        k_cache[row, : length + count] = random(length + count, heads.num_kv_heads, heads.head_size)
        v_cache[row, : length + count] = random(length + count, heads.num_kv_heads, heads.value_size)
    counts = torch.tensor([count for _, count in rows])
    positions = [length + i for length, count in rows for i in range(count)] + [0] * tail
    return Batch(
        q=random(len(positions), heads.num_heads, heads.head_size),
        k_cache=k_cache,
        v_cache=v_cache,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        lengths=torch.tensor([length for length, _ in rows]),
        positions=torch.tensor(positions, dtype=torch.int64),
        options={"scale": heads.head_size**-0.5},
    )


def in_blocks(batch: Batch, size: int, *, shared: int = 0, seed: int = 0) -> Batch:
    """The same batch in a pool of blocks of `size` slots, in any order; what nobody owns is NaN, and has no number.

    The first `shared` blocks of all rows are one: those of the first row.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = -(-batch.k_cache.shape[1] // size)
    held = batch.lengths + batch.offsets.diff()  # [B], an empty row too may hold committed tokens
    used = [-(-count // size) for count in held.tolist()]
    num_blocks = sum(used) + 2
    numbers = iter(torch.randperm(num_blocks, generator=generator).tolist())
    table = torch.full((len(used), columns), -1, dtype=torch.int32)
    caches = batch.k_cache, batch.v_cache
    pools = [torch.full((num_blocks, size, *cache.shape[2:]), math.nan, dtype=cache.dtype) for cache in caches]
    for row, count in enumerate(used):
        for place in range(count):
            if row > 0 and place < shared:
                table[row, place] = table[0, place]
                continue
            table[row, place] = number = next(numbers)
            for pool, cache in zip(pools, caches, strict=True):
                slots = cache[row, place * size : (place + 1) * size]
                pool[number, : len(slots)] = slots
    return replace(batch, k_cache=pools[0], v_cache=pools[1]).with_options(block_table=table)


def in_rings(batch: Batch, size: int, window: int) -> Batch:
    """The same batch with a window: rows keep no more slots than that and their new tokens, in blocks of `size`."""
    new = int(batch.offsets.diff().max())
    count = -(-(window + new - 1) // size)
    rows, capacity = batch.k_cache.shape[:2]
    columns = torch.arange(-(-capacity // size)) % count
    table = (torch.arange(rows)[:, None] * count + columns).to(torch.int32)
    caches = []
    for cache in (batch.k_cache, batch.v_cache):
        ring = cache.new_full((rows * count, size, *cache.shape[2:]), math.nan)
        for row, (length, added) in enumerate(zip(batch.lengths.tolist(), batch.offsets.diff().tolist(), strict=True)):
            for slot in range(length + added):  # the later ones over the earlier ones
                ring[table[row, slot // size], slot % size] = cache[row, slot]
        caches.append(ring)
    return replace(batch, k_cache=caches[0], v_cache=caches[1]).with_options(window=window, block_table=table)


def spoilt(batch: Batch, row: int, value: float) -> Batch:
    """The batch of `in_blocks` with a value in all that is not a row's: other blocks, and the slots behind its last."""
    table, size = batch.options["block_table"], batch.k_cache.shape[1]
    assert isinstance(table, Tensor)
    count = int(batch.lengths[row] + batch.offsets.diff()[row])
    own = table[row, : -(-count // size)].long()
    caches = [torch.full_like(cache, value) for cache in (batch.k_cache, batch.v_cache)]
    for cache, before in zip(caches, (batch.k_cache, batch.v_cache), strict=True):
        cache[own] = before[own]
        cache[own[-1], count % size or size :] = value
    return replace(batch, k_cache=caches[0], v_cache=caches[1])


def with_trees(batch: Batch, *, seed: int = 0, words: int | None = None) -> Batch:
    """The same batch with a random tree per row: ancestors, and the positions that go with them.

    With `words`, there are bits for so many words; a row of more tokens is a chain.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = batch.offsets.diff().tolist()
    width = max([*counts, 1]) if words is None else 32 * words
    ancestors = torch.zeros(len(batch.q), max([*counts, width]), dtype=torch.bool)
    positions = batch.positions.clone()
    for begin, count, length in zip(batch.offsets.tolist(), counts, batch.lengths.tolist(), strict=False):
        for i in range(count):
            if i > 0:
                parent = i - 1 if count > width else int(torch.randint(i, (), generator=generator))
                ancestors[begin + i] = ancestors[begin + parent]
                positions[begin + i] = positions[begin + parent] + 1
            else:
                positions[begin] = length
            ancestors[begin + i, i] = True
    return replace(batch, positions=positions).with_options(ancestors=ops.pack_ancestors(ancestors[:, :width]))


def with_random_bits(batch: Batch, *, seed: int = 0) -> Batch:
    """The same batch with one word of ancestors for each token, filled at random."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(batch.q), 32, generator=generator) < 0.5
    return batch.with_options(ancestors=ops.pack_ancestors(mask))


def oracle(batch: Batch) -> Tensor:
    """`emssd::ragged_attention` one row, one token, one head and one key at a time, in float64."""
    q, k_cache, v_cache = batch.q.double(), batch.k_cache.double(), batch.v_cache.double()
    num_heads, group = q.shape[1], q.shape[1] // k_cache.shape[2]
    out = torch.zeros(len(q), num_heads, v_cache.shape[3], dtype=torch.float64)
    for row, length in enumerate(batch.lengths.tolist()):
        begin, end = int(batch.offsets[row]), int(batch.offsets[row + 1])
        for token in range(begin, end):
            seen = _seen(batch, token, begin, end, length)
            for head in range(num_heads):
                scores = torch.tensor(
                    [
                        _score(batch, head, float(q[token, head] @ k_cache[row, slot, head // group]), distance)
                        for slot, distance in seen
                    ],
                    dtype=torch.float64,
                )
                sinks = batch.options.get("sinks")
                sink = float(sinks[head]) if isinstance(sinks, Tensor) else -math.inf
                top = max(float(scores.max()), sink) if len(scores) else sink
                weights = torch.exp(scores - top)
                weights = weights / (weights.sum() + math.exp(sink - top))
                for weight, (slot, _) in zip(weights, seen, strict=True):
                    out[token, head] += weight * v_cache[row, slot, head // group]
    return out


def _seen(batch: Batch, token: int, begin: int, end: int, length: int) -> list[tuple[int, int]]:
    """Slots the token sees, each with its position minus the token's."""
    ancestors, window = batch.options.get("ancestors"), batch.options.get("window", 0)
    assert isinstance(window, int)
    positions = {slot: slot for slot in range(length)}
    for other in range(begin, end):
        words = ancestors[token] if isinstance(ancestors, Tensor) else ()
        if _bit(words, other - begin) if other - begin < 32 * len(words) else other <= token:
            positions[length + other - begin] = int(batch.positions[other])
    own, chunk = int(batch.positions[token]), batch.options.get("chunk", 0)
    assert isinstance(chunk, int)
    return [
        (slot, position - own)
        for slot, position in positions.items()
        if (window == 0 or position > own - window) and (chunk == 0 or position >= own - own % chunk)
    ]


def _bit(words: Sequence[int] | Tensor, number: int) -> bool:
    """A bit of int32 words: the lowest of the first is number 0."""
    place, bit = divmod(number, 32)
    return bool(int(words[place]) >> bit & 1)


def _score(batch: Batch, head: int, dot: float, distance: int) -> float:
    scale, softcap = batch.options["scale"], batch.options.get("softcap", 0.0)
    slopes = batch.options.get("alibi_slopes")
    assert isinstance(scale, float)
    assert isinstance(softcap, float)
    score = dot * scale
    if softcap > 0:
        score = softcap * math.tanh(score / softcap)
    if isinstance(slopes, Tensor):
        score += float(slopes[head]) * distance
    return score
