"""What happens to tokens as they arrive: stopping criteria, the time limit, streaming."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set

import torch

from emssd_compile.generation import GenerateOptions
from emssd_compile.runtime.inputs import PromptBatch
from emssd_compile.runtime.outputs import apply_stopping_criteria
from emssd_compile.runtime.requests import Request


class Consumer:
    """Hands each new token on, in order, and ends a row where it shall stop.

    Args:
        prompts: the prompts of all requests.
        requests: one for each prompt, in order.
        options: what the call asked for. Its clock starts now.
        known: tokens at which the steps themselves end every row, all the time; it may lose some.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        requests: Sequence[Request],
        options: GenerateOptions,
        known: Set[int] = frozenset(),
    ) -> None:
        self._known = known
        self._row_criteria = options.row_criteria
        self._ends_at = None if options.max_time is None else time.monotonic() + options.max_time
        self._streamer = options.streamer
        self._seen = [0] * len(requests)  # tokens of each row that were handed on
        criteria = options.stopping_criteria
        self._lockstep = Lockstep(prompts, requests, options) if criteria else None
        if self._streamer is not None:
            self._streamer.put(prompts.given[0][None].clone())  # what it does to it is its own business

    def take(self, request: Request) -> int:
        """Consume what is new in `request.output`, cut where the row stops; returns how many tokens were kept."""
        start = self._seen[request.index]
        self._stop(request, start)
        if self._lockstep is not None:
            self._lockstep.ask()
        if self._streamer is not None:
            for token in request.output[start:]:
                self._streamer.put(torch.tensor([token]))
        self._seen[request.index] = len(request.output)
        return len(request.output) - start

    def _stop(self, request: Request, start: int) -> None:
        """End a row at its first EOS, at the first token for which a criterion holds, or when its time is over."""
        eos = request.eos_token_ids - self._known
        count = next((n for n, token in enumerate(request.output[start:], start + 1) if token in eos), None)
        if count is not None:
            request.end(count, "eos")
        if self._ends_at is not None and time.monotonic() > self._ends_at:
            request.end(start + 1, "deadline")
        if not self._row_criteria:
            return
        ids = request.prompt.tolist() + request.output[:start]
        for count, token in enumerate(request.output[start:], start + 1):
            ids.append(token)
            if any(apply_stopping_criteria(self._row_criteria, torch.tensor([ids]))):
                request.end(count)
                return


class Lockstep:
    """Asks stopping criteria as transformers does: with the whole batch, once for each new token of its rows.

    Rows get their tokens at different times, and several at once. So what comes early waits: the criteria are asked
    about the n-th new token when every row has one, or has ended before. They see what transformers would show them,
    and may count their calls and keep what they like for each row. A row that has run ahead is cut back.

    Args:
        prompts, requests, options: as for `Consumer`.
    """

    def __init__(self, prompts: PromptBatch, requests: Sequence[Request], options: GenerateOptions) -> None:
        self._criteria = options.stopping_criteria
        self._requests = requests
        self._width, self._asked = max(prompts.widths), 0
        # What the vocabulary knows: a criterion may look the ids up, or decode them.
        pad = 0 if options.pad_token_id is None else options.pad_token_id
        most = max(request.max_new_tokens for request in requests)
        self._ids = torch.full((len(requests), self._width + most), pad)  # [B, n]
        for row, given in zip(self._ids, prompts.given, strict=True):
            row[self._width - len(given) : self._width] = given  # on the left, as decoders are padded
        self._ids = self._ids.to(prompts.device)

    def ask(self) -> None:
        """Ask about each token that all rows have reached by now."""
        while any(len(request.output) > self._asked for request in self._requests) and all(
            request.finished or len(request.output) > self._asked for request in self._requests
        ):
            place = self._width + self._asked
            self._asked += 1
            going = [len(request.output) >= self._asked for request in self._requests]
            for index, request in enumerate(self._requests):
                if going[index]:
                    self._ids[index, place] = request.output[self._asked - 1]
            ends = apply_stopping_criteria(self._criteria, self._ids[:, : place + 1])
            for request, is_going, is_end in zip(self._requests, going, ends, strict=True):
                if is_going and is_end:
                    request.end(self._asked)
