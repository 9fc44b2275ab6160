"""Logits processors written in Python for transformers, called between the two halves of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emssd_compile.errors import ProcessorError
from emssd_compile.runtime.requests import Request
from emssd_compile.step.logits import LogitContext

HFProcessor = Callable[[Tensor, Tensor], Tensor]
"""`processor(input_ids[N, n], scores[N, V]) -> scores[N, V]`, as transformers' `LogitsProcessor` is called."""
AllowedTokens = Callable[[int, Tensor], Sequence[int]]
"""`prefix_allowed_tokens_fn(batch_id, input_ids[n])`: the ids that may follow this text."""


class PythonLogits:
    """A logits hook that calls what transformers' `generate` would call.

    Each packed token is processed with its own text, the drafts on the way to it included; texts of one length are
    handed over together, whichever rows they are of. So what a processor does to a logit must depend on the text before
    it: one that counts its calls, or keeps something for each row of a batch, would see drafts that are rejected later.
    In the first step each is called twice, and refused if it does not say the same of the same texts.

    Args:
        processors: called in this order.
        allowed: what may follow a text; comes before the processors.
        requests: gives the request of each row now; its index is the `batch_id`.
    """

    def __init__(
        self,
        processors: Sequence[HFProcessor],
        allowed: AllowedTokens | None,
        requests: Callable[[], Sequence[Request | None]],
    ) -> None:
        self._processors, self._allowed, self._requests = tuple(processors), allowed, requests
        self._is_first = True

    def __call__(self, context: LogitContext) -> Tensor:
        """The processed logits, `[R, V]`.

        Raises:
            ProcessorError: a processor returned something other than scores, or other ones for the same texts; or
                nothing is allowed.
        """
        logits, lengths = context.logits, context.positions  # what predicts position n goes on from n tokens
        texts = context.newest(int(lengths.max()))  # [R, n], at the right
        for length in lengths[lengths > 0].unique().tolist():  # 0: behind the last row
            chosen = (lengths == length).nonzero().squeeze(1)
            input_ids, scores = texts[chosen, texts.shape[1] - length :], logits[chosen]
            if self._allowed is not None:
                scores = self._restrict(input_ids, scores, context.row_ids[chosen].tolist())
            for processor in self._processors:
                given, scores = scores, _checked(processor, processor(input_ids, scores.clone()), scores)
                if self._is_first:
                    _check_repeats(processor, input_ids, given, scores)
            logits[chosen] = scores
        if bool((lengths > 0).any()):  # a step that only reads prompts asks nobody
            self._is_first = False
        return logits

    def _restrict(self, input_ids: Tensor, scores: Tensor, rows: list[int]) -> Tensor:
        assert self._allowed is not None
        requests = self._requests()
        mask = torch.full_like(scores, -torch.inf)
        for text, row, line in zip(input_ids, rows, mask, strict=True):
            request = requests[row]
            if request is None:  # its end is not known on the device yet
                line.fill_(0)
                continue
            ids = self._allowed(request.index, text)
            if len(ids) == 0:
                raise ProcessorError(
                    f"prefix_allowed_tokens_fn allows nothing behind the {len(text)} tokens of row {request.index}; "
                    "return at least one id, such as that of EOS"
                )
            line[torch.as_tensor(ids, device=line.device)] = 0
        return scores + mask


def _checked(processor: Any, answer: object, scores: Tensor) -> Tensor:
    name = type(processor).__name__
    if not isinstance(answer, Tensor) or answer.shape != scores.shape:
        found = f"a tensor of shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ProcessorError(f"the logits processor {name} returned {found}; it is to return {list(scores.shape)}")
    if bool(answer.isnan().any()):
        raise ProcessorError(f"the logits processor {name} returned NaN")
    return answer.to(scores)


def _check_repeats(processor: HFProcessor, input_ids: Tensor, scores: Tensor, answer: Tensor) -> None:
    """Refuse a processor that keeps something from call to call, as matchers of grammars for each row of a batch do."""
    name, error = type(processor).__name__, None
    try:
        again = processor(input_ids, scores.clone())
        if isinstance(again, Tensor) and torch.equal(again.to(answer), answer):
            return
    except Exception as raised:
        error = raised
    said = "differs" if error is None else f"raised {error!r}"
    raise ProcessorError(
        f"the logits processor {name}, called twice with the same texts, {said}; "
        "it keeps something from call to call, but texts hold drafts here that may be rejected: make it depend on "
        "input_ids alone, and for grammars see emssd_compile.grammar"
    ) from error
