"""What `/metrics` tells, under the names that vLLM gives it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emssd_compile.serve.choice import Choice
from emssd_compile.session import Session
from emssd_compile.stream import StreamStats

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_TOKENS = tuple(1 << n for n in range(0, 18, 2))


class Metrics(Collector):
    """Follows texts from their start to their end. For one thread.

    Args:
        name: of the model.
        session: what decodes.
    """

    def __init__(self, name: str, session: Session) -> None:
        self._registry = CollectorRegistry()
        self._labels, self._session = (name, "0"), session
        self._live: list[Choice] = []
        self._ended = _Totals()
        self._reasons = Counter(
            "vllm:request_success", "Texts that have ended", (*_LABELS, "finished_reason"), registry=self._registry
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens of a text", _TOKENS)
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token", _SECONDS)
        self._each = self._histogram("request_time_per_output_token_seconds", "A token behind the first", _SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to its end", _SECONDS)
        self._registry.register(self)

    def follow(self, choice: Choice) -> None:
        """Count a text from now on."""
        self._sweep()
        self._live.append(choice)

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        self._sweep()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The counters of texts that have ended and of those that have not."""
        totals = copy.deepcopy(self._ended)
        for choice in self._live:
            totals.add(choice.num_prompt_tokens, choice.stream.stats)
        yield self._counter("prompt_tokens", "Tokens of prompts", totals.prompt)
        yield self._counter("generation_tokens", "Tokens generated", totals.generation)
        yield self._counter("prefix_cache_queries", "Tokens of prompts that were looked for", totals.looked_for)
        yield self._counter("prefix_cache_hits", "Those that were found, and so not read", totals.found)
        yield self._counter("spec_decode_num_drafts", "Steps of a text that verified drafts", totals.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Drafts that were verified", totals.draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Drafts that were accepted", sum(totals.accepted))
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted, by place", labels=(*_LABELS, "position")
        )
        for place, count in enumerate(totals.accepted):
            places.add_metric((*self._labels, str(place)), count)
        yield places
        running, waiting = self._session.num_requests
        for name, about, value in (("running", "have a row", running), ("waiting", "wait for a row", waiting)):
            gauge = GaugeMetricFamily(f"vllm:num_requests_{name}", f"Texts that {about}", labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge

    def _sweep(self) -> None:
        """Take those that have ended into the sums."""
        live = []
        for choice in self._live:
            if not choice.stream.done or choice.finish_reason is None:
                live.append(choice)
                continue
            stats = choice.stream.stats
            self._ended.add(choice.num_prompt_tokens, stats)
            self._reasons.labels(*self._labels, choice.finish_reason).inc()
            self._prompt.observe(choice.num_prompt_tokens)
            self._generation.observe(stats.num_tokens)
            self._whole.observe(stats.seconds)
            if stats.time_to_first_token is not None:
                self._first.observe(stats.time_to_first_token)
                if stats.num_tokens > 1:
                    self._each.observe((stats.seconds - stats.time_to_first_token) / (stats.num_tokens - 1))
        self._live = live

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(f"vllm:{name}", about, _LABELS, buckets=buckets, registry=self._registry)
        return histogram.labels(*self._labels)

    def _counter(self, name: str, about: str, value: int) -> Metric:
        counter = CounterMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        counter.add_metric(self._labels, value)
        return counter


@dataclass
class _Totals:
    """Sums over texts.

    Attributes:
        prompt, generation: tokens.
        looked_for, found: tokens of prompts, in the prefix cache.
        drafts: steps of a text that verified drafts.
        draft_tokens: drafts of these.
        accepted: element i is how many of them accepted their draft number i, the first being 0.
    """

    prompt: int = 0
    generation: int = 0
    looked_for: int = 0
    found: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: list[int] = field(default_factory=list)

    def add(self, num_prompt_tokens: int, stats: StreamStats) -> None:
        """Add those of a text."""
        self.prompt += num_prompt_tokens
        self.generation += stats.num_tokens
        if stats.num_cached_tokens is not None:
            self.looked_for += num_prompt_tokens
            self.found += stats.num_cached_tokens
        self.drafts += sum(stats.acceptance_histogram)
        self.draft_tokens += stats.num_draft_tokens
        self.accepted += [0] * (len(stats.acceptance_histogram) - 1 - len(self.accepted))
        for place in range(len(stats.acceptance_histogram) - 1):
            self.accepted[place] += sum(stats.acceptance_histogram[place + 1 :])
