"""KV cache of the realigned baseline: after each step rows are moved so that all of them end at the same slot."""

from functools import cache

import torch
from torch import Tensor

from bench.baselines.padded_cache import PaddedCache


class RealignedCache(PaddedCache):
    """Rows share one write index and have no holes: what a shorter row leaves free lies before its first token.

    `commit` keeps what each row accepted and then moves all rows, keys and values of every layer, into spare buffers of
    which there is one for all layers. That is one read and one write of the cache, and none after a step that left the
    rows aligned.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        super().__init__(num_rows, device)
        self._spare: dict[str, Tensor] = {}

    def commit(self, kept: Tensor, advance: int) -> None:
        """See `PaddedCache.commit`; afterwards the write index is the longest row's length."""
        super().commit(kept, advance)
        width = self._committed.shape[1]
        lengths = self._committed.sum(dim=1)
        holes = (kept[:, :advance].flip(1).cumsum(dim=1) == 0).sum(dim=1)  # [B], behind each row's newest token
        longest, most_holes = torch.stack([lengths.max(), holes.max()]).tolist()
        if longest == width and most_holes == 0:
            return
        self._move(width - longest - holes)
        self.kv.crop(longest - width)
        self._committed = torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]

    def _move(self, shifts: Tensor) -> None:
        """Makes slot `j` of row `b` what was slot `j + shifts[b]`."""

        @cache
        def index(num_heads: int, capacity: int) -> Tensor:  # of [B, Hkv, capacity], flattened
            slots = (torch.arange(capacity, device=shifts.device) + shifts[:, None]).clamp_(0, capacity - 1)
            starts = torch.arange(len(shifts) * num_heads, device=shifts.device) * capacity
            return (starts.view(-1, num_heads, 1) + slots[:, None]).flatten()

        for layer in self.kv.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = self._spare.get(name)
                if new is None or new.shape != old.shape:
                    new = torch.empty_like(old)
                head_size = old.shape[-1]
                torch.index_select(old.view(-1, head_size), 0, index(*old.shape[1:3]), out=new.view(-1, head_size))
                setattr(layer, name, new)
                self._spare[name] = old
