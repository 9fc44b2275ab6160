"""Masks of grammars, laid over the logits between the two halves of each step."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emssd_compile.errors import OptionError
from emssd_compile.grammar import Grammar
from emssd_compile.grammar_text import GrammarText, Node, Stop
from emssd_compile.matcher import MaskMatcher
from emssd_compile.numeric import shown
from emssd_compile.runtime.requests import Request
from emssd_compile.step.logits import LogitContext

_BARRED_END = (
    "its text is complete, and the EOS that would end it is barred, by min_new_tokens, min_length or another option of "
    "the logits; lower it, or use a grammar whose texts are longer"
)
_BARRED = "all that the grammar allows there is barred by other options of the logits; relax them"
_NOTHING = "the grammar allows none of the model's tokens there, and its text is not complete; use another grammar"


def grammar_of_each(grammar: object, prompts: int) -> list[Grammar | None]:
    """The grammar of each prompt, of one for all of them or a list with one or None for each.

    Raises:
        OptionError: there is something else than a grammar, not one for each, or their tokenizers differ.
    """
    several: list[Any] = list(grammar) if isinstance(grammar, (list, tuple)) else [grammar] * prompts
    if len(several) != prompts:
        raise OptionError(f"grammar has {len(several)} values for {prompts} prompts; pass one for each, or one for all")
    for each in several:
        if not isinstance(each, Grammar | None):
            raise OptionError(
                f"grammar={shown(each)} is no Grammar; make one with emssd_compile.grammar: json_schema(schema, "
                "tokenizer), regex, lark or matching"
            )
    if len({each.vocab_size for each in several if each}) > 1:
        raise OptionError("grammar: they were made for different tokenizers; make all with that of the model")
    return several


class GrammarLogits:
    """A logits hook that bars what the grammar of a request does not allow.

    Each packed token has the mask of its own text: what was generated, and the drafts on the way to it. The matcher of
    a row reads what is decided, walks over the tree of drafts, each edge once, and is rolled back. An EOS is allowed
    where the grammar may end. Behind a draft that is not allowed nothing is masked, since no text goes there.

    Args:
        grammars: of each request, by its index; at least one.
        eos_token_ids: what ends a text in this call.
        requests: gives the request of each row now.

    Raises:
        OptionError: nothing ends a text.
    """

    def __init__(
        self,
        grammars: Sequence[Grammar | None],
        eos_token_ids: Sequence[int],
        requests: Callable[[], Sequence[Request | None]],
    ) -> None:
        if not eos_token_ids:
            raise OptionError("grammar: a complete text ends with an EOS, and there is none; pass eos_token_id")
        self._grammars, self._eos, self._requests = grammars, list(eos_token_ids), requests
        known = [each for each in grammars if each is not None]
        self._num_words = -(-max(each.vocab_size for each in known) // 32)
        self._ends = {*eos_token_ids, *(token for each in known for token in each.ends)}
        self._texts: dict[int, GrammarText] = {}  # by row

    @classmethod
    def of(
        cls,
        grammars: Sequence[Grammar | None],
        sequences: int,
        eos_token_ids: Sequence[int],
        requests: Callable[[], Sequence[Request | None]],
    ) -> GrammarLogits | None:
        """For prompts with these grammars, so many sequences of each; None if no prompt has one."""
        if not any(grammars):
            return None
        return cls([each for each in grammars for _ in range(sequences)], eos_token_ids, requests)

    def __call__(self, context: LogitContext) -> Tensor:
        """The masked logits, `[R, V]`.

        Raises:
            GrammarError: a text has nothing to go on with.
        """
        walks = [text.walk(paths) for text, paths in self._follow(context)]
        stops: list[Stop] = []
        masks = np.zeros((len(context.positions), self._num_words), np.int32)
        for halts in zip_longest(*walks):  # all rows go on by a node
            here = [stop for stop in halts if stop is not None]
            _fill([(stop.text.matcher, line) for line, stop in enumerate(here, len(stops))], masks)
            stops += here
        return self._mask(context.logits, stops, torch.from_numpy(masks[: len(stops)])) if stops else context.logits

    def settle(self) -> None:
        """Look at what the last step decided, when all requests have ended.

        Raises:
            GrammarError: a text went on where it had nothing to go on with.
        """
        for text in self._texts.values():
            text.settle()

    def _follow(self, context: LogitContext) -> Iterator[tuple[GrammarText, list[Node]]]:
        """The text of each row that has a grammar, read up to what is decided, and its nodes."""
        rows = context.row_ids
        known, prompts = context.known[rows], context.prompt_lengths[rows]  # [R]
        head = torch.stack([rows, context.positions, context.positions - known, known - prompts], 1)  # [R, 4]
        newest = context.newest(context.draft.max_depth + 1)  # [R, D + 1]: as many tokens as a step gives at most
        nodes: dict[int, list[Node]] = {}
        decided: dict[int, tuple[int, list[int]]] = {}
        for place, (row, position, depth, count, *tokens) in enumerate(torch.cat([head, newest], 1).tolist()):
            if position > 0:  # 0: behind the last row
                nodes.setdefault(row, []).append((tuple(tokens[len(tokens) - depth :]), place))
            if position > 0 and depth == 0:
                decided[row] = count, tokens
        requests = self._requests()
        for row, paths in nodes.items():
            text = self._text_of(row, requests[row])
            if text is not None:
                text.follow(*decided[row])
                yield text, paths

    def _text_of(self, row: int, request: Request | None) -> GrammarText | None:
        held = self._texts.get(row)
        if held is not None and held.request is not request:
            held.settle()
            del self._texts[row]
        grammar = None if request is None else self._grammars[request.index]
        if request is not None and grammar is not None and row not in self._texts:
            self._texts[row] = GrammarText(request, grammar, self._eos, self._ends)
        return self._texts.get(row)

    def _mask(self, logits: Tensor, stops: Sequence[Stop], masks: Tensor) -> Tensor:
        """Bar what is not allowed at these places; where that is all, change nothing and note it.

        Args:
            logits: `[R, V]`, written to.
            stops: n nodes.
            masks: int32 `[n, W]`, a bit for each token.
        """
        device = logits.device
        places = torch.tensor([stop.place for stop in stops], device=device)  # [n]
        may_end = torch.tensor([stop.may_end for stop in stops], device=device)  # [n]
        allowed = _unpacked(masks.to(device), logits.shape[1])  # [n, V]
        allowed[:, [token for token in self._ends if token < logits.shape[1]]] = False
        allowed[:, self._eos] = may_end[:, None]
        masked = logits[places].masked_fill(~allowed, -torch.inf)
        is_barred = masked.isneginf().all(1)  # [n]
        logits[places] = torch.where(is_barred[:, None], logits[places], masked)
        for number in is_barred.nonzero().flatten().tolist():
            stop = stops[number]
            if stop.may_end:
                why = _BARRED_END
            elif bool(allowed[number].any()):
                why = _BARRED
            else:
                why = f"{_NOTHING} ({stop.text.stop_reason(stop.path)})"
            stop.text.bar(stop.path, why)
        return logits


def _fill(matchers: list[tuple[Any, int]], masks: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """Write what each matcher allows into its line of `masks[n, W]`; those of llguidance in parallel."""
    of_llguidance = []
    for matcher, line in matchers:
        if isinstance(matcher, MaskMatcher):
            masks[line] = matcher.mask
        else:
            of_llguidance.append((matcher, line))
    if of_llguidance:
        library: Any = importlib.import_module("llguidance.numpy")
        library.fill_next_token_bitmask_par(_executor(), of_llguidance, masks)


@functools.cache
def _executor() -> Any:
    library: Any = importlib.import_module("llguidance")
    return library.LLExecutor()


def _unpacked(words: Tensor, vocabulary: int) -> Tensor:
    """Bool `[n, V]` of bits, int32 `[n, W]`, the lowest first; False for tokens behind them."""
    octets = words.view(torch.uint8)  # [n, 4 W], on a machine whose bytes are in the order of its bits
    bits = (octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1  # [n, 4 W, 8]
    known = bits.flatten(1)[:, :vocabulary].bool()
    return F.pad(known, (0, vocabulary - known.shape[1]))
