"""A request, the row that decodes it, and a step under way: what the host knows of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emssd_compile.runtime.block_keys import BlockKeys
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.launch import Report


@dataclass(eq=False)
class Request:
    """One prompt to continue.

    Attributes:
        index: the caller's number for it.
        prompt: int64 `[S]`, on the CPU.
        max_new_tokens: it ends after so many.
        options: what it sets for the parts of the step, by name: a number, or a line of a table (`RowOption.read`).
        group: requests of one prompt have the same number, so that it is read once for all that run at a time; None: it
            is the only one of its prompt.
        eos_token_ids: tokens that end it. The step ends it at those that all of its rows have in common, its consumer
            at the others.
        seed: of its random numbers, for acceptance rules that draw.
        num_read: tokens of the prompt, less than S, whose KV the row's cache is taken to hold already.
        scope: requests of the same one may share what is read of beginnings that they have in common; None: it shares
            with none but those of its group.
        block_keys: by what blocks of its text are found, once it has been asked.
        num_cached_tokens: those of its prompt that others had read and it did not; None where nobody looked for them.
        output: tokens emitted so far.
        told: what probes told of them, by the names of results: pieces `[n, ...]`, in order.
        finished: whether it has ended.
        finish_reason: why its caller ended it; empty where the step did, by an EOS or its limit.
        num_steps: steps in which it emitted tokens, its prompt being read.
        num_draft_tokens: drafts that these verified.
        num_accepted_draft_tokens: those of them that other tokens of the same step followed, so they were accepted.
        acceptance_histogram: element i is how many steps that verified drafts accepted exactly i of them.
    """

    index: int
    prompt: Tensor
    max_new_tokens: int
    options: Mapping[str, float | Tensor] = field(default_factory=dict)
    group: int | None = None
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    num_read: int = 0
    scope: bytes | None = None
    block_keys: BlockKeys | None = field(default=None, repr=False)
    num_cached_tokens: int | None = None
    output: list[int] = field(default_factory=list)
    told: dict[str, list[Tensor]] = field(default_factory=dict)
    finished: bool = False
    finish_reason: str = ""
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)

    def take(self, tokens: list[int], readings: Mapping[str, Tensor]) -> None:
        """Have new tokens, and what is told of them: a line for each."""
        self.output.extend(tokens)
        for name, lines in readings.items():
            self.told.setdefault(name, []).append(lines)

    def reading(self, name: str) -> Tensor:
        """`[n, ...]`: what was told of each token of its output, which is not empty."""
        return torch.cat(self.told[name])[: len(self.output)]

    def count_step(self, num_emitted: int, num_drafts: int) -> None:
        """Note a step that verified so many drafts and emitted so many tokens, at least one."""
        self.num_steps += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_draft_tokens += num_emitted - 1
        if num_drafts:
            self.acceptance_histogram += [0] * (num_emitted - len(self.acceptance_histogram))
            self.acceptance_histogram[num_emitted - 1] += 1

    def end(self, count: int, reason: str = "stop") -> None:
        """End it after `count` tokens; what it has emitted beyond them is forgotten."""
        del self.output[count:]
        self.finished, self.finish_reason = True, reason


@dataclass
class Row:
    """What the host knows of a row; as old as the last report that was read.

    Attributes:
        request: what it decodes.
        pending: tokens that it knows and has not read.
        draft_length: drafts that it verifies behind them.
        is_active: whether the device goes on with it.
        unseen: tokens that the drafter has yet to read: fed by plain steps, or read by another row.
        is_whole: whether the drafter lacks nothing that it should remember of it.
    """

    request: Request
    pending: int
    draft_length: int = 0
    is_active: bool = True
    unseen: int = 0
    is_whole: bool = True

    @property
    def num_known(self) -> int:
        """Tokens that it knows, prompt and new ones."""
        return len(self.request.prompt) + len(self.request.output)


@dataclass(frozen=True)
class RunningStep:
    """A step under way.

    Attributes:
        report: what it tells the host, perhaps not there yet.
        sizes: of the step.
        requests: which request each row held when it was launched.
        started: when that was, seconds of `time.perf_counter`.
        drafted: whether it verified drafts and left new ones.
        is_plain: whether it ran without the drafter, or without what is costly of it.
    """

    report: Report
    sizes: StepSizes
    requests: tuple[Request | None, ...]
    started: float
    drafted: bool = True
    is_plain: bool = False
