"""What is kept of texts that have been read, for requests to come that begin in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emssd_compile.runtime.pages import Pages

if TYPE_CHECKING:
    from emssd_compile.optimized_model import OptimizedModel


class PrefixCache:
    """Blocks of keys and values that are found by the tokens in them and before them.

    They are those of requests that run or have ended, as long as the pool of `memory="paged"` needs them for no other.
    Who begins with the same whole blocks, and has the same `cache_salt`, does not read these again.

    Args:
        fast: whose memory it is.
    """

    def __init__(self, fast: OptimizedModel) -> None:
        self._fast = fast

    @property
    def num_blocks(self) -> int:
        """How many blocks can be found."""
        return self._pages.num_kept

    @property
    def num_tokens(self) -> int:
        """How many tokens are in them."""
        return self.num_blocks * self._pages.block_size

    @property
    def queries(self) -> int:
        """Tokens of prompts that were looked for since `stats.reset()`."""
        return self._fast.stats.prefix_cache_queries

    @property
    def hits(self) -> int:
        """Those of them that were found."""
        return self._fast.stats.prefix_cache_hits

    def clear(self) -> None:
        """Find none any more.

        Raises:
            SessionError: a session is open.
            ReentryError: it was called from inside a `generate`.
        """
        with self._fast._turns.take("prefix_cache.clear"):
            self._pages.forget()

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self.num_blocks} blocks, {self.num_tokens} tokens; of {self.queries} tokens of prompts "
            f"{self.hits} were found)"
        )

    @property
    def _pages(self) -> Pages:
        memory = self._fast._engine.memory
        assert isinstance(memory, Pages), "prefix_cache=True asks for a pool"
        return memory
