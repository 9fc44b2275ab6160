"""What happens to tokens as they arrive: stopping criteria, streaming, progress."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emssd_compile.generation import StoppingCriterion, Streamer
from emssd_compile.runtime.inputs import PromptBatch
from emssd_compile.runtime.outputs import apply_stopping_criteria
from emssd_compile.runtime.requests import Request


class Consumer:
    """Hands each new token on, in order, and ends a row where a stopping criterion holds.

    Args:
        prompts: the prompts of all requests.
        criteria: Hugging Face's stopping criteria; called once per row and new token.
        streamer: gets the only prompt and then its tokens one by one.
    """

    def __init__(self, prompts: PromptBatch, criteria: Sequence[StoppingCriterion], streamer: Streamer | None) -> None:
        self.criteria = criteria
        self.streamer = streamer
        self._seen = [0] * len(prompts)
        if streamer is not None:
            streamer.put(prompts.given[0][None])

    def take(self, request: Request) -> int:
        """Consume what is new in `request.output`, cut where a criterion holds; returns how many tokens were kept."""
        start = self._seen[request.index]
        if self.criteria:
            self._stop(request, start)
        if self.streamer is not None:
            for token in request.output[start:]:
                self.streamer.put(torch.tensor([token]))
        self._seen[request.index] = len(request.output)
        return len(request.output) - start

    def end(self) -> None:
        """No more tokens follow."""
        if self.streamer is not None:
            self.streamer.end()

    def _stop(self, request: Request, start: int) -> None:
        ids = request.prompt.tolist() + request.output[:start]
        for count, token in enumerate(request.output[start:], start + 1):
            ids.append(token)
            if apply_stopping_criteria(self.criteria, ids):
                del request.output[count:]
                request.finished = True
                return
