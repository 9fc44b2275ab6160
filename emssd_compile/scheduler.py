"""What `generate` and sessions decode with: calls begin and end, and Python between the steps sees their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Generic

from emssd_compile.ambient import neutral
from emssd_compile.calls import Call
from emssd_compile.ends import shared_eos
from emssd_compile.jobs import FinishReason, Jobs, JobT
from emssd_compile.runtime.admission import Admission, next_request
from emssd_compile.runtime.consumer import Consumer
from emssd_compile.runtime.kv_memory import Beginning, KVMemory
from emssd_compile.runtime.requests import Request, Row

if TYPE_CHECKING:
    from emssd_compile.decoder import Decoder
    from emssd_compile.lowering.halves import LogitsHook


class Scheduler(Admission, Generic[JobT]):
    """Decodes jobs in the thread that asks: their requests start in free rows, first come, first served.

    What a job's consumer raises ends that job; what a hook raises ends `decode`.

    Args:
        decoder: has the engine; whoever asks has its turn.
        jobs: more may be put meanwhile.
        options: those that every step honours, whether a request sets them or not.
    """

    def __init__(self, decoder: Decoder, jobs: Jobs[JobT], options: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._decoder, self._jobs, self._options = decoder, jobs, options
        self._eos: frozenset[int] = frozenset()  # those that the step knows
        self._known: set[int] = set()  # those that it has known all the time since nothing ran
        self._used: frozenset[str] | None = None  # options that the form of the step honours; None before any
        self._hooked = False
        self._is_heard = False  # whether that form calls the hooks

    def prepare(self) -> bool:
        """Have a step that suits the job that waits longest; there is one. False if none does, which has ended it."""
        decoder = self._decoder
        self._eos, self._used, self._hooked = shared_eos(self._jobs.first().call.requests), None, False
        self._known = {*self._eos}
        with neutral(decoder._default_dtype):
            decoder._follow()
            is_ready = self._has_step(self._jobs.first())
            if is_ready and not decoder._is_warm:
                decoder._warm_up(progress=False)
        return is_ready

    def decode(self) -> None:
        """Decode until there is nothing to do, or what waits cannot run beside what runs; `prepare` has been called."""
        with ExitStack() as self._hooks, self._decoder._running(self, self._eos) as run:
            while self._advance(run):
                pass

    def _advance(self, run: Iterator[Request]) -> bool:
        """Decode on to the next new tokens, and hand them over; False if nothing runs any more."""
        request = next(run, None)
        if request is not None:
            self._hand_over(request)
        return request is not None

    def _hand_over(self, request: Request) -> None:
        """Let new tokens go through their consumer to whoever reads them."""
        job = self._jobs.of(request)
        assert job.consumer is not None
        try:
            count = job.consumer.take(request)
            has_ended = request.finished and job.has_ended()
            if has_ended:
                self._end_streamer(job)
                if job.call.masks is not None:
                    job.call.masks.settle()
        except BaseException as error:
            self._end(job, "error", error)
            return
        job.deliver(request, count)
        if has_ended:
            self._end(job)

    def _end_streamer(self, job: JobT) -> None:
        """Tell its streamer, if it has one, that no more tokens follow; who hears that may look at the stats."""
        streamer = job.call.chosen.streamer
        if streamer is not None:
            self._decoder._count()
            streamer.end()

    def __bool__(self) -> bool:
        """Whether the first that waits can run beside those that do."""
        return self._jobs.counts()[1] > 0 and self._may_run(self._jobs.first())

    def _may_run(self, job: JobT) -> bool:
        """Whether it does, or can beside those that do: all that need to see their own EOS do."""
        if job.consumer is not None:
            return True
        jobs = [*self._jobs.begun(), job]
        shared = shared_eos(request for each in jobs for request in each.call.requests)
        looking = (request for each in jobs if each.call.looks_at_ends for request in each.call.requests)
        return all(request.eos_token_ids == shared for request in looking)

    def take(self, rows: Sequence[Row | None], memory: KVMemory) -> Beginning | None:
        """Start the first that waits, if there is memory for it; who waits until others have read is overtaken."""
        while (beginning := next_request(self._startable(), rows, memory)) is not None:
            job = self._jobs.start(beginning.request)
            if job.consumer is not None or self._begin(job):
                return beginning
        return None

    def _startable(self) -> Iterator[Request]:
        """Those that wait, up to the first that cannot run beside what does."""
        for request in self._jobs.waiting():
            if not self._may_run(self._jobs.of(request)):
                return
            yield request

    def _begin(self, job: JobT) -> bool:
        """Whether there is a step for it, and its consumer is ready."""
        if not self._has_step(job):
            return False
        try:
            self._hear(job.call)
            self._tell_eos()
            job.consumer = Consumer(job.call.prompts, job.call.requests, job.call.chosen, self._known)
        except BaseException as error:
            self._end(job, "error", error)
            return False
        return True

    def _has_step(self, job: JobT) -> bool:
        """Drive a form of the step that suits it too; False if there is none, which has ended it."""
        try:
            self._suit(job.call)
        except BaseException as error:
            self._end(job, "error", error)
            return False
        return True

    def _suit(self, call: Call) -> None:
        """Drive a form of the step that honours what this call sets, and all that was set since nothing ran."""
        used, hooked = call.used | (self._used or self._options), self._hooked or bool(call.hooks)
        if (used, hooked) != (self._used, self._hooked):
            self._decoder._select(used, hooked=hooked)
            self._used, self._hooked, self._is_heard = used, hooked, False

    def _hear(self, call: Call) -> None:
        """Have the form of the step that is driven call the hooks: not before a run, since a warm-up is no text."""
        if not self._is_heard:
            self._hooks.enter_context(self._decoder._calling(self._hooks_of_steps(call)))
            self._is_heard = True

    def _hooks_of_steps(self, call: Call) -> tuple[LogitsHook, ...]:
        """What steps call between their halves when this call has begun: it is the only one."""
        return call.hooks

    def _tell_eos(self) -> None:
        """Have the step end rows at what ends all that run."""
        shared = shared_eos(request for job in self._jobs.begun() for request in job.call.requests)
        if shared != self._eos:
            self._decoder._engine.set_eos([*shared])
            self._eos = shared
            self._known &= shared

    def _end(self, job: JobT, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """Free its places, and tell who waits for it; the reason is None if its requests have ended by themselves."""
        for request in job.call.requests:
            if not request.finished:
                request.end(len(request.output), reason or "stop")
        self._jobs.remove(job)
        job.finish(reason, error)
