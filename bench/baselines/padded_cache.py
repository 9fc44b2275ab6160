"""KV cache of the padded baseline: rows share one write index, so one that accepts less than the best keeps holes."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 256
"""Slots added to a layer's buffers when they are full."""


class SharedIndexLayer(DynamicLayer):
    """Keys and values of one layer, `[B, Hkv, capacity, D]`, written in place.

    Its parent concatenates, which copies the whole cache every step; the padded baseline must not be slow for that
    reason.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes empty buffers of the dtype and device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes `[B, Hkv, Q, D]` at the shared index and returns views of all slots written so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self.keys.shape[-2]:
            self.keys = _grown(self.keys, key_states, self._length + GROWTH)
            self.values = _grown(self.values, value_states, self._length + GROWTH)
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Slots written so far, holes included."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Gives the last `|tokens_to_remove|` slots back, to be overwritten by the next update."""
        self._length -= abs(tokens_to_remove)


def _grown(buffer: Tensor, new: Tensor, capacity: int) -> Tensor:
    """`buffer` with room for `capacity` slots; the heads and head size are those of `new`."""
    grown = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
    grown[:, :, : buffer.shape[-2]] = buffer
    return grown


class PaddedCache:
    """The KV cache of `B` rows with one write index, and which of its slots hold a committed token.

    Each forward pass writes `Q` slots to every row at the shared index. `commit` then keeps as many of them as the best
    row needs; what other rows do not need of those stays behind as holes, which `attention_mask` hides forever.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.kv = Cache(layer_class_to_replicate=SharedIndexLayer)
        self._committed = torch.zeros(num_rows, 0, dtype=torch.bool, device=device)

    @property
    def num_padding_slots(self) -> int:
        """Slots before the write index that hold no committed token, all rows together; counted once, not per layer."""
        return int((~self._committed).sum())

    def attention_mask(self, is_real: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive mask of the next forward pass.

        Args:
            is_real: `[B, Q]` bool, false where the input is padding.
            dtype: the model's; hidden places get its smallest finite number, visible ones 0.

        Returns:
            `[B, 1, Q, W + Q]`, with `W` the write index: a token sees the row's committed slots, and the real tokens
            among the new ones up to itself. Padding sees itself too: a softmax over nothing can be NaN in half
            precision, and a NaN value poisons every later sum even at weight 0.
        """
        num_queries = is_real.shape[1]
        index = torch.arange(num_queries, device=is_real.device)
        earlier, itself = index < index[:, None], index == index[:, None]
        visible_old = self._committed[:, None, :].expand(-1, num_queries, -1)
        visible_new = (earlier & is_real[:, None, :]) | itself
        hidden = ~torch.cat([visible_old, visible_new], dim=-1)[:, None]
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)

    def commit(self, kept: Tensor, advance: int) -> None:
        """Moves the write index after a forward pass.

        Args:
            kept: `[B, Q]` bool, true for tokens that belong to the row's text.
            advance: slots that the index moves by, at most `Q`; nothing at or after it may be kept.
        """
        rejected = kept.shape[1] - advance
        if rejected:
            self.kv.crop(-rejected)
        self._committed = torch.cat([self._committed, kept[:, :advance]], dim=1)
