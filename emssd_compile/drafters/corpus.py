"""Finished texts that drafters look the newest tokens up in: they outlive the calls that made them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from emssd_compile.errors import CheckpointError, OptionError
from emssd_compile.files import write_whole
from emssd_compile.numeric import integer, shown

GRAMS = {"pairs": 2, "quads": 4}
"""The tables of places, and by how many tokens before a place each finds it."""
SLOTS = 8
"""Places that a bucket of a table holds: the newest ones of all texts that meet there."""
MOST_IDS = 1 << 31
"""Tokens and corpus ids are less than this."""

_TENANT = 1 << 32  # texts hold corpus id x this + token: what is of another tenant is never equal
_END = -1
_PRIME, _FACTOR = (1 << 31) - 1, 1_000_003  # no product of the two overflows int64
_FORMAT, _VERSION = "emssd_compile.corpus", "1"


class Corpus:
    """Finished texts in a ring of tokens, the newest of them, and tables that find places in it.

    Texts belong to tenants, by a number (`corpus_id`). A row finds texts of its own tenant and no others: the number is
    part of each token that is compared. All texts are of one vocabulary.

    It may be filled by hand (`add`), by decoding (`SuffixLookup(corpus=...)` adds what has been generated), or both, by
    several models and threads. Steps read its tensors as they are: one that runs while a text is being added may find a
    place whose text is half there. That changes what is drafted, never which tokens come out.

    Attributes:
        capacity_tokens: tokens that the ring holds, those between texts included.
        prompts: whether what decoding adds is prompts and outputs, or outputs alone, as in 2411.04975.
        tensors: `texts` int64 `[capacity_tokens]`, `pairs` and `quads` int32 `[buckets, 8]`: where a text goes on
            behind 2 and behind 4 tokens, plus 1, the newest first; 0 for nothing.

    Args:
        capacity_tokens: at least 16. It takes 24 bytes a token, on the host and where steps run.
        prompts: as above.

    Raises:
        OptionError: an option makes no sense.
    """

    def __init__(self, capacity_tokens: int = 1 << 18, *, prompts: bool = False) -> None:
        most = MOST_IDS - 1  # places are int32
        self.capacity_tokens = integer("Corpus capacity_tokens", capacity_tokens, least=16, most=most)
        if type(prompts) is not bool:
            raise OptionError(f"Corpus prompts={shown(prompts)}; pass True or False")
        self.prompts = prompts
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            self.tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self._form().items()}
        self.clear()

    def _form(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the tensors: twice as many slots in each table as there are tokens."""
        table = (-(-2 * self.capacity_tokens // SLOTS), SLOTS), torch.int32
        return {"texts": ((self.capacity_tokens,), torch.int64), **dict.fromkeys(GRAMS, table)}

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock, torch.no_grad():
            self.tensors["texts"].fill_(_END)
            for name in GRAMS:
                self.tensors[name].zero_()
            self._next = 1  # where the next text begins; an end lies before it

    def add(self, tokens: Sequence[int] | Tensor, corpus_id: int = 0) -> None:
        """Add a text; the oldest ones make room. Of one that is longer than the ring its end is kept.

        Args:
            tokens: ids of the vocabulary, `[n]`.
            corpus_id: whose it is.

        Raises:
            OptionError: the id is out of range, or the tokens are no ids.
        """
        tenant = integer("corpus_id", corpus_id, least=0, most=MOST_IDS - 1)
        try:
            text = torch.as_tensor(tokens).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"Corpus.add: {shown(tokens)} are no ids; pass a list of integers") from error
        if text.dim() != 1:
            raise OptionError(f"Corpus.add: tokens of shape {list(text.shape)} are no text; pass one text, [n]")
        if text.dtype not in (torch.int64, torch.int32) and len(text):
            raise OptionError(f"Corpus.add: tokens of {text.dtype} are no ids; pass them as int64 or int32")
        text = text.to(torch.int64)[-(self.capacity_tokens - 1) :]
        if not bool(((text >= 0) & (text < MOST_IDS)).all()):
            raise OptionError("Corpus.add: a token is below 0 or beyond int32; pass ids of the vocabulary")
        if len(text):
            with self._lock, torch.no_grad():
                self._write(keys(text, torch.tensor(tenant)))

    def _write(self, text: Tensor) -> None:
        places = (self._next + torch.arange(len(text) + 1)) % self.capacity_tokens
        self.tensors["texts"][places] = torch.cat([text, text.new_full((1,), _END)])
        self._next = (self._next + len(text) + 1) % self.capacity_tokens
        for name, size in GRAMS.items():
            if len(text) > size:  # behind the last ones nothing goes on
                table = self.tensors[name]
                bucket = buckets(text.unfold(0, size, 1)[:-1], len(table))  # [n - size]
                _prepend(table, bucket, places[size:-1] + 1)

    def save(self, path: str | Path) -> None:
        """Write it to one file of safetensors, which is whole at any time."""
        with self._lock:
            metadata = {"format": _FORMAT, "version": _VERSION, "next": str(self._next), "prompts": str(self.prompts)}
            data = save(self.tensors, metadata=metadata)
        write_whole(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read what `save` has written.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or no corpus.
        """
        path = Path(path)
        try:
            with torch.inference_mode(False), safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; it is missing, cut off or damaged") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no corpus; pass a file that Corpus.save has written")
        if metadata.get("version") != _VERSION:
            raise CheckpointError(
                f"{path} is a corpus of version {shown(metadata.get('version'))}, this package reads {_VERSION}; fill "
                "a new one"
            )
        return cls._of(path, metadata, tensors)

    @classmethod
    def _of(cls, path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Corpus:
        size = tensors["texts"].numel() if "texts" in tensors else 0
        cursor, prompts = metadata.get("next", ""), metadata.get("prompts")
        if prompts not in ("True", "False") or not cursor.isdecimal() or len(cursor) > 12 or not 16 <= size < MOST_IDS:
            raise CheckpointError(f"{path} lacks its texts or their order; it is damaged, fill a new one")
        made = cls(size, prompts=prompts == "True")
        made._next = int(cursor)
        found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
        if found != made._form() or made._next >= size:
            raise CheckpointError(f"{path} holds {found}, expected {made._form()}; it is damaged, fill a new one")
        bounds = {name: (_END, MOST_IDS * _TENANT - 1) if name == "texts" else (0, size) for name in tensors}
        for name, (least, most) in bounds.items():
            if not bool(((tensors[name] >= least) & (tensors[name] <= most)).all()):
                raise CheckpointError(f"{path}: {name} holds numbers out of range; it is damaged, fill a new one")
        made.tensors = tensors
        return made


def keys(tokens: Tensor, corpus_id: Tensor) -> Tensor:
    """Tokens as a corpus holds them for a tenant, int64; equal for equal tokens of one tenant only."""
    return corpus_id * _TENANT + tokens


def tokens_of(held: Tensor, corpus_id: Tensor) -> Tensor:
    """The tokens of a tenant that `keys` made, int64; out of any vocabulary where there is no token of this tenant."""
    return held - corpus_id * _TENANT


def buckets(grams: Tensor, count: int) -> Tensor:
    """Which of `count` buckets n-grams of keys `[..., n]` fall into, int64 `[...]`; the same on host and device."""
    found = torch.zeros_like(grams[..., 0])
    for place in range(grams.shape[-1]):
        found = (found * _FACTOR + grams[..., place] % _PRIME) % _PRIME
    return found % count


def _prepend(table: Tensor, bucket: Tensor, values: Tensor) -> None:
    """Put values before what their buckets hold, the last ones first; what no longer fits a bucket is dropped."""
    order = bucket.flip(0).argsort(stable=True)
    bucket, values = bucket.flip(0)[order], values.flip(0)[order]
    touched, which, counts = bucket.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(bucket)) - (counts.cumsum(0) - counts)[which]  # [n], among those of its bucket
    slot = torch.arange(SLOTS)
    lines = table[touched].gather(1, (slot - counts[:, None]).clamp(min=0))  # what was there, moved back
    fits = rank < SLOTS
    lines[which[fits], rank[fits]] = values[fits].to(table.dtype)
    table[touched] = lines
