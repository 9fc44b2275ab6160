"""The loop around the step graph: rows start, steps run, reports are read, rows end and make room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from emssd_compile.layouts import PackedLayout
from emssd_compile.runtime.admission import Admission
from emssd_compile.runtime.buckets import StepSizes
from emssd_compile.runtime.draft_clock import DraftClock
from emssd_compile.runtime.dry_run import DryRun, dry_run
from emssd_compile.runtime.host_parts import HostParts
from emssd_compile.runtime.kv_memory import KVMemory
from emssd_compile.runtime.launch import Launcher, Report, Variant
from emssd_compile.runtime.planning import Planner
from emssd_compile.runtime.requests import Request, Row, RunningStep
from emssd_compile.runtime.rows import first_values, option_values
from emssd_compile.runtime.step_times import StepTimes, assumed_times, sizes_to_measure
from emssd_compile.step.commit import REPORT_FIELDS
from emssd_compile.step.drafting import most_unread
from emssd_compile.step.state import COUNTERS

_PLAIN_COUNTS = REPORT_FIELDS.index("plain_counts")
PUBLISH_EVERY = 8  # steps after which the device gets new step times


class Engine:
    """Drives the step over the device-resident state, which the launcher owns.

    The host launches step i + 1 before it reads the report of step i (`lag` = 1; on a CPU, where a launch is a call
    that returns when its work is done, there is nothing to overlap and `lag` = 0). Only the sizes of a step are
    chosen here; what is in it is decided on the device.

    Args:
        launcher: runs steps and owns their tensors.
        memory: where rows keep keys and values.
        layout: how much room a step gives to drafts.
        parts: what is told of requests that have ended.
        prefill_chunk: most packed tokens of a step.
        lag: reports that may be outstanding.
        deterministic: choose sizes without a clock, forget at the start of a run what earlier ones taught, and tell
            parts of none: so the steps of a run depend on its requests alone.
    """

    def __init__(
        self,
        launcher: Launcher,
        memory: KVMemory,
        layout: PackedLayout,
        parts: HostParts,
        *,
        prefill_chunk: int,
        lag: int,
        deterministic: bool = False,
    ) -> None:
        self.launcher = launcher
        self.memory = memory
        self.parts = parts
        self.num_rows, self.capacity = launcher.tensors["history"].shape
        sizes = launcher.variant.signature.sizes
        self.num_draft_tokens, self.max_depth, self._depth = sizes.num_draft_tokens, sizes.max_depth, sizes.depth
        self.chunk = prefill_chunk
        self.lag = lag
        self.deterministic = deterministic
        self.sizes_used: set[StepSizes] = set()
        most = self.num_rows * (self.num_draft_tokens + 1)
        self.times = assumed_times(most, self.tensors["history"].device) if deterministic else StepTimes(most)
        self.planner = Planner(self.num_rows, self.num_draft_tokens, self.chunk, layout, self.times, self.max_depth)
        self._clock: DraftClock | None = None  # one for all forms: what is measured hardly differs between them
        self._note_roles()
        self._room = self.num_rows * self.num_draft_tokens  # drafts that the step launched next may verify
        self._has_drafts = True  # whether the step launched last may have left drafts
        self._last_read = 0.0
        self._num_observed = 0
        self._rows: list[Row | None] = [None] * self.num_rows

    def run(self, requests: Admission | Sequence[Request], eos_token_ids: Sequence[int] = ()) -> Generator[Request]:
        """Decode `requests`, as many at a time as there are rows; yields a request whenever it has new tokens.

        The consumer may end any of them early, not only the one it was handed; see `Request.end`. The run is over when
        no request waits and none runs.
        """
        if self.deterministic:
            self._forget()
        self.set_eos(eos_token_ids)
        self.parts.give()
        waiting = requests if isinstance(requests, Admission) else Admission(requests)
        launched: deque[RunningStep] = deque()
        try:
            while waiting or launched or any(self._rows):
                self._admit(waiting)
                if any(self._rows):
                    launched.append(self._launch(launched))
                while launched and (len(launched) > self.lag or not any(self._rows)):
                    yield from self._collect(launched.popleft())
                    self._release()
        finally:
            self._clear()

    def use(self, variant: Variant, tensors: dict[str, Tensor]) -> None:
        """Drive another form of the step; `tensors` are those that only it has.

        Rows that are busy go on, but for the drafts that they hold: another form may have made them in another way.
        """
        before = self._row_state
        self.launcher.use(variant, tensors)
        self._note_roles()
        busy = {b: row.request for b, row in enumerate(self._rows) if row}
        if busy:
            rows, requests = self.launcher.upload(torch.tensor([*busy])), [*busy.values()]
            values = option_values(requests, self._options)
            self._write(rows, {**values, "draft_lengths": torch.zeros(len(busy), dtype=torch.int64)})
            self._zero(rows, [name for name in self._row_state if name not in before])
            self.parts.give()
        for row in filter(None, self._rows):
            row.draft_length = 0

    def _note_roles(self) -> None:
        self.variant = self.launcher.variant  # the form that is driven, also while plain steps run
        if self.variant.plain is not None and self._clock is None:
            self._clock = DraftClock(StepTimes(self.num_rows), remembers=self.variant.drafter_remembers)
        signature = self.variant.signature
        self._row_state = tuple(signature.with_role("row"))
        self._memory = tuple(signature.with_role("memory"))
        self._options = signature.with_role("option")
        self._kept = tuple(signature.with_role("state", "setting", "option", "row", "memory", "table"))

    @property
    def requests(self) -> tuple[Request | None, ...]:
        """What each row decodes in the step that is launched next, or being launched."""
        return tuple(row.request if row else None for row in self._rows)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """State, the drafter's state and caches by name; to change one, assign to it through the launcher."""
        return self.launcher.tensors

    @property
    def clock(self) -> DraftClock | None:
        """What chooses between steps with the drafter and plain ones, if the form that is driven has both."""
        return None if self.variant.plain is None else self._clock

    @property
    def is_measured(self) -> bool:
        """Whether steps are timed, since the layout asks for it."""
        return self.planner.layout.is_measured and not self.deterministic

    def set_eos(self, eos_token_ids: Sequence[int]) -> None:
        """End rows at these tokens from the next step on."""
        is_eos = torch.zeros(self.tensors["is_eos"].shape, dtype=torch.bool)
        is_eos[list(eos_token_ids)] = True
        self.launcher.assign("is_eos", self.launcher.upload(is_eos))

    def warmup(self) -> None:
        """Compile: run the step once."""
        with self._dry_run() as dry:
            # Not more than a step of these rows can ever have: an artifact may be made for no more.
            dry.decode(min(2, self.num_rows * (self.num_draft_tokens + 1)))

    def capture(self) -> Iterator[StepSizes]:
        """Run every bucket of sizes once, so that none is captured later; yields each when done."""
        with self._dry_run() as dry:
            for sizes in self.launcher.buckets:
                dry.step(sizes)
                yield sizes

    def calibrate(self) -> None:
        """Measure steps of some sizes with nothing in them, if the layout asks for times; tell the device."""
        if self.is_measured:
            captured = [bucket.token_range for bucket in self.launcher.buckets]
            with self._dry_run() as dry:
                seconds = dry.idle_seconds(captured or sizes_to_measure(self.times.most))
                self.times.calibrate(seconds, is_stepped=bool(self.launcher.buckets))
                plain = self.variant.plain
                if self.clock is not None and plain is not None:
                    few = [size for size in captured if plain.drafts or size < 2 * self.num_rows]
                    self.launcher.use(plain, {})
                    seconds = dry.idle_seconds(few or sizes_to_measure(self.num_rows))
                    self.clock.plain.calibrate(seconds, is_stepped=bool(self.launcher.buckets))
                    self.launcher.use(self.variant, {})
        self._publish_times()

    def _dry_run(self) -> AbstractContextManager[DryRun]:
        return dry_run(self.launcher, self.memory, self._kept, self.num_draft_tokens, self.max_depth)

    def counters(self) -> tuple[dict[str, int], list[int]]:
        """The counters, read from the device, those of the memory, and the acceptance histogram; all are reset."""
        counts = dict(zip(COUNTERS, self.tensors["counters"].tolist(), strict=True)) | self.memory.take_counts()
        histogram = self.tensors["histogram"].tolist()
        for name in ("counters", "histogram"):
            self.launcher.assign(name, torch.zeros_like(self.tensors[name]))
        return counts, histogram

    def _admit(self, waiting: Admission) -> None:
        """Start waiting requests in free rows."""
        waiting.update()
        self._release()
        started: dict[int, Request] = {}
        read: list[int] = []
        for b in [b for b, row in enumerate(self._rows) if row is None]:
            beginning = waiting.take(self._rows, self.memory)
            if beginning is None:
                break
            request, count = beginning.request, beginning.num_read
            source = None if beginning.source is None else self._rows[beginning.source]
            is_whole = source is None or source.is_whole
            self._rows[b] = Row(request, pending=len(request.prompt) - count, unseen=count, is_whole=is_whole)
            if self._clock is not None and is_whole:
                self._clock.see_new_row()
            self.memory.start(self.launcher, b, beginning)  # if that fails, the row is there to be released
            started[b] = request
            read.append(count)
        if not started:
            return
        rows, requests = self.launcher.upload(torch.tensor([*started])), [*started.values()]
        self._write(rows, {**first_values(requests, read, self.capacity), **option_values(requests, self._options)})
        self._zero(rows, self._row_state)

    def _write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give some rows, `[n]`, these values, `[n, ...]` each."""
        for name, value in values.items():
            self.launcher.assign(name, self.tensors[name].index_copy(0, rows, self.launcher.upload(value)))

    def _zero(self, rows: Tensor, names: Iterable[str]) -> None:
        for name in names:
            self.launcher.assign(name, self.tensors[name].index_fill(0, rows, 0))

    def _launch(self, launched: Collection[RunningStep]) -> RunningStep:
        plain = None if self.clock is None or self.clock.is_drafting else self.variant.plain
        variant = plain or self.variant
        drafts = self._room if self.lag else sum(row.draft_length for row in self._rows if row)
        # a step that verifies none drops the drafts that there are
        verified = drafts if variant.drafts and self._has_drafts else 0
        sizes = self.planner.sizes(self._rows, launched, verified, is_plain=plain is not None)
        self.memory.prepare(self.launcher, self._tokens_behind(len(launched) + 1))
        self.launcher.use(variant, {})
        self._has_drafts = variant.drafts
        if self.clock is not None and self.clock.is_missed:
            for row in filter(None, self._rows):
                row.is_whole = False
        if self.lag:
            self._make_room(sum(row is not None for row in self._rows))
        started = time.perf_counter()
        report = self._run_step(sizes)
        return RunningStep(report, sizes, self.requests, started, variant.drafts, plain is not None)

    def _tokens_behind(self, num_steps: int) -> dict[int, int]:
        """How many tokens each busy row may hold behind so many more steps, with drafts of the last one; at most."""
        most = num_steps * (self._depth + 1) + self.num_draft_tokens
        return {b: row.num_known + most for b, row in enumerate(self._rows) if row}

    def _make_room(self, busy: int) -> None:
        """Tell the device how many drafts the step after the next may verify, since its sizes are planned unseen."""
        room = self.planner.room(busy, self.launcher.buckets)
        if room != self._room:
            self._room = room
            self.launcher.assign("draft_budget", self.launcher.upload(torch.tensor(room)))

    def _run_step(self, sizes: StepSizes) -> Report:
        self.sizes_used.add(sizes)
        self.launcher.rows_in_use = 1 + max(b for b, row in enumerate(self._rows) if row)
        return self.launcher.launch(sizes)

    def _observe(self, launch: RunningStep, lines: list[list[int]]) -> None:
        """Learn what a step took: with steps under way all the time, from the last report to this one."""
        now = time.perf_counter()
        if self.is_measured:
            seconds = now - max(self._last_read, launch.started)
            if not launch.is_plain:
                seconds = self.times.observe(launch.sizes.token_range, seconds)
            self._tell_clock(launch, lines, seconds)
            self._num_observed += 1
            if self._num_observed % PUBLISH_EVERY == 0:
                self._publish_times()
        self._last_read = now

    def _tell_clock(self, launch: RunningStep, lines: list[list[int]], seconds: float) -> None:
        """Let the clock see a step, if each row has decoded in it."""
        rows = [*zip(lines, launch.requests, self._rows, strict=True)]
        counts = [line[0] for line, request, _ in rows if request]
        held = [(line, row) for line, request, row in rows if row and row.request is request]
        if self.clock is None or not all(counts) or not held:
            return
        whole = [line for line, row in held if row.is_whole]
        self.clock.observe(
            drafted=not launch.is_plain,
            num_rows=len(counts),
            num_whole=len(whole),
            worth=sum(line[0] / line[_PLAIN_COUNTS] for line in whole),
            seconds=seconds,
        )

    def _publish_times(self) -> None:
        self.launcher.assign("step_seconds", self.launcher.upload(self.times.table()))

    def _collect(self, launch: RunningStep) -> Iterator[Request]:
        """Read one report: hand out tokens, free the rows that ended."""
        columns = len(REPORT_FIELDS)
        lines = launch.report.read()
        self._observe(launch, lines)
        if launch.drafted:
            self._record_wanted_drafts(launch, lines)
        reading = most_unread(self.planner.max_depth) * sum(request is not None for request in launch.requests)
        spare = launch.sizes.draft_range - reading  # for what plain steps fed
        for b, line in enumerate(lines):
            row, request = self._rows[b], launch.requests[b]
            if row is None or request is not row.request or request.finished:
                continue  # the row was empty then, or has ended since
            read, drafts = row.pending, row.draft_length if launch.drafted else 0
            count, active, row.pending, row.draft_length, *_ = line
            if not launch.is_plain:
                caught_up = min(row.unseen, max(spare, 0))
                row.unseen, spare = row.unseen - caught_up, spare - caught_up
            else:
                row.unseen += read + count - row.pending
            request.take(line[columns : columns + count], self._told(launch.report, b, count, request))
            self.memory.note_read(b, row.num_known - row.pending)
            if count and read == 1:
                request.count_step(count, drafts)
            row.is_active = bool(active)
            request.finished = not row.is_active
            if count:
                yield request

    def _told(self, report: Report, row: int, count: int, request: Request) -> dict[str, Tensor]:
        """What the request asked to be told of its `count` new tokens. Copies: a report holds much else."""
        specs = self.variant.signature.readings if count else {}
        asked = [name for name, spec in specs.items() if not spec.asked_by or spec.asked_by in request.options]
        return {name: report.readings[name][row, :count].clone() for name in asked if name in report.readings}

    def _record_wanted_drafts(self, launch: RunningStep, lines: list[list[int]]) -> None:
        """Take how many drafts are wanted, unless no row could draft all it may: prompts are read, or all rows end."""
        counts, active, _, _, wanted, *_ = zip(*lines, strict=True)
        drafting = [(r, n) for r, n, alive in zip(launch.requests, counts, active, strict=True) if r and n and alive]
        if any(r.max_new_tokens - len(r.output) - n > self._depth for r, n in drafting):
            self.planner.record_wanted_drafts(wanted[0], len(drafting))

    def _release(self) -> None:
        """Free the rows whose requests have ended."""
        ended = {b: row for b, row in enumerate(self._rows) if row and row.request.finished}
        for b in ended:
            self._rows[b] = None
            self.memory.release(b)
        if ended and not self.deterministic:
            self.parts.tell([row.request for row in ended.values()])
        running = [b for b, row in ended.items() if row.is_active]
        if running:  # ended by the caller: the device does not know yet
            rows = self.launcher.upload(torch.tensor(running))
            self.launcher.assign("active", self.tensors["active"].index_fill(0, rows, False))

    def _forget(self) -> None:
        """Be as after the warm-up."""
        for name in self._memory:
            self.launcher.assign(name, torch.zeros_like(self.tensors[name]))
        self.planner.forget()
        self._make_room(self.num_rows)

    def _clear(self) -> None:
        """Leave no active row behind, also when the consumer stops early."""
        for b, row in enumerate(self._rows):
            if row:
                self.memory.release(b)
        self.memory.end_run()
        self._rows = [None] * self.num_rows
        self.launcher.assign("active", torch.zeros_like(self.tensors["active"]))
