"""Options of `optimize`, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.errors import OptionError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS
from emssd_compile.numeric import flag, integer
from emssd_compile.step.paging import BLOCK_SIZE, check_kv_tokens

MOST_DRAFTS = 1024  # of a row in a step; what ranks drafts compares all pairs
PREFILL_CHUNK = 512  # packed tokens of a step, unless the rows' drafts alone take more
MEMORY = ("auto", "slab", "paged")
KV_DTYPES = ("int8",)


@dataclass(frozen=True)
class CompileOptions:
    """Sizes and choices that are fixed when a model is compiled.

    Attributes:
        max_batch: B, rows of KV cache; more prompts than rows are queued.
        max_length: C, tokens a row can hold, prompt and output together.
        backend: `"eager"` or `"inductor"`.
        layout: `"packed"`, `"padded"` or `"auto"` (see `layouts`).
        prefill_chunk: most packed tokens of a step; longer prompts are read in chunks. None: see `chunk`.
        deterministic: whether the sizes of steps depend on nothing but the call.
        memory: where keys and values are: `"slab"`, `"paged"` or `"auto"`.
        kv_tokens: tokens that the pool of paged memory holds; None for as many as there is memory for.
        prefix_cache: whether what is read stays in the pool for requests to come.
        kv_dtype: `"int8"` if keys and values are kept in 8 bits, which is lossy; None: as the model computes them.
    """

    max_batch: int
    max_length: int
    backend: str = "inductor"
    layout: str = "auto"
    prefill_chunk: int | None = None
    deterministic: bool = False
    memory: str = "auto"
    kv_tokens: int | None = None
    prefix_cache: bool = False
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_length", 1), ("prefill_chunk", 1)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer(name, value, least=least))
        if self.max_length < 2:
            raise OptionError("max_length=1 leaves no room for an output token; use at least 2")
        if self.backend not in BACKENDS:
            raise OptionError(f"unknown backend {self.backend!r}; choose one of {list(BACKENDS)}")
        if self.layout not in LAYOUTS:
            raise OptionError(f"unknown layout {self.layout!r}; choose one of {list(LAYOUTS)}")
        object.__setattr__(self, "deterministic", flag("deterministic", self.deterministic))
        if self.memory not in MEMORY:
            raise OptionError(f"unknown memory {self.memory!r}; choose one of {list(MEMORY)}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise OptionError(f"unknown kv_dtype {self.kv_dtype!r}; choose one of {list(KV_DTYPES)}, or leave it out")
        if self.kv_tokens is not None:
            object.__setattr__(self, "kv_tokens", integer("kv_tokens", self.kv_tokens, least=1))
            if self.memory == "slab":
                raise OptionError(
                    f"kv_tokens={self.kv_tokens} is for memory='paged': slabs hold max_length tokens for each row; "
                    "leave one of them out"
                )
        object.__setattr__(self, "prefix_cache", flag("prefix_cache", self.prefix_cache))
        if self.prefix_cache and self.memory == "slab":
            raise OptionError("prefix_cache=True is for memory='paged': slabs have nothing in common; leave one out")
        if self.prefix_cache and self.deterministic:
            raise OptionError(
                "prefix_cache=True makes the sizes of steps depend on earlier calls, and deterministic=True on the "
                "call alone; leave one of them out"
            )

    @property
    def asks_for_pool(self) -> bool:
        """Whether memory is to be paged even if slabs fit."""
        return self.memory == "paged" or self.kv_tokens is not None or self.prefix_cache

    def check_pool(self, spare: int) -> None:
        """Check the size of a pool whose rows may need so many slots behind their last token.

        Raises:
            OptionError: `kv_tokens` is too small for any request, or more than rows can hold.
        """
        if self.kv_tokens is None:
            return
        check_kv_tokens(self.kv_tokens, spare)
        most = BLOCK_SIZE * -(-(self.max_length + spare) // BLOCK_SIZE)
        if self.kv_tokens > self.max_batch * most:
            raise OptionError(
                f"kv_tokens={self.kv_tokens} is more than {self.max_batch} rows of {self.max_length} tokens take; pass "
                f"at most {self.max_batch * most}, or a larger max_batch or max_length"
            )

    def chunk(self, num_draft_tokens: int) -> int:
        """Most packed tokens of a step of rows that have up to `num_draft_tokens` drafts each.

        All of that is one step's work: each row's newest token and its drafts. More than all rows can hold never is.

        Raises:
            OptionError: `prefill_chunk` has no room for it, or there are more drafts than a row may have.
        """
        if num_draft_tokens > MOST_DRAFTS:
            raise OptionError(f"num_draft_tokens={num_draft_tokens}: a row has at most {MOST_DRAFTS} drafts")
        least = self.max_batch * (num_draft_tokens + 1)
        if self.prefill_chunk is None:
            return max(PREFILL_CHUNK, least)
        if self.prefill_chunk < least:
            raise OptionError(
                f"prefill_chunk={self.prefill_chunk} is less than the {least} tokens that a step of "
                f"{self.max_batch} rows with {num_draft_tokens} drafts each takes; pass at least {least}, or a smaller "
                "max_batch or num_draft_tokens"
            )
        return min(self.prefill_chunk, max(least, self.max_batch * self.max_length))
