"""Put packing, the model, acceptance and the next drafts into one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from emssd_compile.errors import DrafterError, PolicyError, ProbeError, ProcessorError, RuleError
from emssd_compile.ops import append_kv, move_kv, ragged_attention
from emssd_compile.passes.graph import caches, call, fresh_index, results
from emssd_compile.passes.splice import Tensors, add_input, inline, inline_function
from emssd_compile.passes.split_halves import SEAM
from emssd_compile.passes.traced_part import TracedPart
from emssd_compile.step.acceptance import GUARANTEES, Rule, Verdict, Verification, feasible
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.commit import Emission, commit, make_report, newly_read, plain_counts
from emssd_compile.step.drafting import Draft, DraftContext, Drafter
from emssd_compile.step.fields import holds_tensors, named, with_named
from emssd_compile.step.logits import LogitContext, LogitsProcessor, Processed
from emssd_compile.step.nodes import Nodes, select
from emssd_compile.step.pack import LogitRows, Packed, as_trees, logit_rows, pack
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking, fit, outcome, proposed_drafts
from emssd_compile.step.probe import READING, Probe, ProbeContext, Probed, ReadingSpec, merge_readings
from emssd_compile.step.proposals import DETERMINISTIC, WITHOUT_REPLACEMENT, how_drawn
from emssd_compile.step.signature import DRAFT_ROWS, SIZE_NAMES, role_of_state
from emssd_compile.step.state import CONSTANT_FIELDS, StepState


class FuseStep:
    """Wrap the unpadded model into a step over the device-resident state.

    What is fed, what is accepted, what is kept, what is drafted next and how much of it is verified are tensor
    operations; traced around the model they make one graph that needs nothing from the host but sizes, given by the
    lengths of `arange`s. Where drafts are trees, the KV of the accepted path moves right behind the committed tokens.

        before:  forward(input_ids[T], positions[T], row_ids[T], offsets[B+1], lengths[B], logit_index[R], caches)
        after:   forward(history[B,C], known[B], draft_tokens[B,K], ..., token_range[T], logit_range[R], ..., caches)
                     -> {history, known, draft_tokens, ..., report, reading_<name>, rule_<name>, drafter_<name>, ...}

    Args:
        batch: sizes of the batch.
        rule: what accepts drafts.
        drafter: what proposes them.
        policy: what chooses how many of them are verified.
        fake_mode: of the graph.
        processors: what is done to the logits, in order; their numbers name their tensors.
        probes: what looks at what was decided; their numbers name their tensors.
        beside: a drafter whose steps this one runs between: it takes their state and leaves it to them, with no draft
            in it; its own drafter proposes nothing then.
        shows_logits: return what a `LogitContext` holds, too, as it is when the processors are done: at these results
            `split_halves` can cut the step.
        drafts_for_few: draft for as many rows as the input `draft_rows[A]` is long, the first ones, if the drafter can:
            the host knows that no other row is decoded. Its own caches are `[A, slots, ...]` then.
    """

    name = "fuse_step"

    def __init__(
        self,
        batch: BatchShape,
        rule: Rule,
        drafter: Drafter,
        policy: LengthPolicy,
        fake_mode: FakeTensorMode,
        processors: Mapping[int, LogitsProcessor] = MappingProxyType({}),
        probes: Mapping[int, Probe] = MappingProxyType({}),
        *,
        beside: Drafter | None = None,
        shows_logits: bool = False,
        drafts_for_few: bool = False,
    ) -> None:
        self.shows_logits = shows_logits
        self.drafts_for_few = drafts_for_few
        self.beside = beside
        self.batch = batch
        self.rule = rule
        self.drafter = drafter
        self.policy = policy
        self.processors = processors
        self.probes = probes
        self.readings: dict[str, ReadingSpec] = {}
        self.fake_mode = fake_mode
        self.notes: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule) -> int:
        """Replace the model's graph by that of the step.

        Raises:
            RuleError, DrafterError, PolicyError, ProcessorError, ProbeError: that part fails while it is traced, or
                breaks its contract.
        """
        model = _LazyGraphModule(graph_module, graph_module.graph)
        graph_module.graph = fx.Graph()
        fusion = _Fusion(self, graph_module, model)
        graph_module.graph.output(fusion.step())
        told = merge_readings(probe.readings for probe in fusion.probes)
        self.readings = {f"{READING}{name}": spec for name, spec in told.items()}
        rule, promise = type(self.rule).__name__, GUARANTEES[self.rule.guarantees]
        said = {"tokens": (), "distribution": (f"{rule}: {promise}",), "lossy": (f"{rule} is lossy: {promise}",)}
        parts = (self.rule, self.drafter, self.policy, *self.processors.values(), *self.probes.values())
        self.notes = (*said[self.rule.guarantees], *(note for part in parts for note in part.notes()))
        return 1


@holds_tensors
@dataclass
class _Read:
    """What a step has read: its tokens, and what the model says of them."""

    packed: Packed
    rows: LogitRows
    taps: dict[str | int, Tensor]
    logits: Tensor


@holds_tensors
@dataclass
class _Done:
    """What a step has decided, and what follows from it for the next drafts."""

    emission: Emission
    ready: Tensor
    verified: Nodes
    path: Tensor | None
    last: Tensor


class _Fusion:
    """The graph of a step while it is made. Dataclasses of tensors hold nodes here, but for the functions traced."""

    def __init__(self, of: FuseStep, into: fx.GraphModule, model: fx.GraphModule) -> None:
        self.into, self.model, self.fake_mode, self.batch = into, model, of.fake_mode, of.batch
        self.shows_logits, self.drawn = of.shows_logits, how_drawn(of.rule, of.drafter)
        self.taps, self.reads_logits, self.writes_kv = of.drafter.taps, of.drafter.reads_logits, of.drafter.writes_kv
        logits, drafter = results(model.graph)[1].meta["val"], of.drafter
        self.sizes, self.costly_grades = sizes_of(of.batch, logits.shape[-1], of.rule, drafter), drafter.costly_grades
        self.is_beside = of.beside is not None
        outer = sizes_of(of.batch, logits.shape[-1], of.rule, of.beside or drafter)
        self.rule = TracedPart("rule", of.rule, Verdict, RuleError, self.sizes)
        self.drafter = TracedPart("drafter", drafter, Draft, DrafterError, self.sizes)
        self.policy = TracedPart("policy", of.policy, Ranking, PolicyError, self.sizes)
        self.processors = [
            TracedPart(f"processor_{number}", processor, Processed, ProcessorError, self.sizes)
            for number, processor in of.processors.items()
        ]
        self.probes = [
            TracedPart(f"probe_{number}", probe, Probed, ProbeError, self.sizes) for number, probe in of.probes.items()
        ]
        with self.fake_mode:
            empty = StepState.empty(outer, logits.device)
        graph = into.graph
        state = {name: add_input(graph, name, value, role_of_state(name)) for name, value in named(empty).items()}
        self.state = self.given = with_named(empty, state)
        self.ranges = {
            name: add_input(graph, name, fresh_index(self.fake_mode, logits.device), "size") for name in SIZE_NAMES
        }
        self.caches = {name: add_input(graph, name, value, "cache") for name, value in caches(model.graph).items()}
        self.draft_rows: fx.Node | None = None
        if of.drafts_for_few and drafter.any_rows and self.sizes.rows > 1:
            self.draft_rows = add_input(graph, DRAFT_ROWS, fresh_index(self.fake_mode, logits.device), "size")

    def step(self) -> dict[str, fx.Node]:
        """Everything in order; returns the results by name."""
        if self.is_beside:
            self.state = self._inline(StepState.without_drafts, self.given)
        read = self._read()
        if self.processors or self.shows_logits or self.probes:
            read = replace(read, logits=self._inline(torch.Tensor.float, read.logits))  # as Hugging Face has them
        raw = read.logits
        if self.shows_logits and self.probes:  # what is changed between the halves is one value, what is told another
            read = replace(read, logits=self._inline(torch.clone, raw))
        read, states = self._process(read, filters=False)
        shown = named(self._inline(self._logit_context, self.state, read)) if self.shows_logits else {}
        seam = {f"{SEAM}{name}": node for name, node in shown.items()}
        read, of_filters = self._process(read, filters=True)
        verdict, rule_state = self._part(self.rule, self._inline(self._verification, self.state, read))
        state, done = self._inline(self._commit, self.state, read, verdict)
        self._move_kv(done)
        readings, of_probes = self._probe(read, raw, done)
        context = self._inline(self._draft_context, self.state, state, read, done, self.ranges)
        context = replace(context, caches=self.caches if self.writes_kv else {})
        draft, drafter_state = self.drafter.inline(self.into, context, self.fake_mode, few_rows=self.draft_rows)
        proposed = self._inline(self._propose, draft, context.max_drafts)
        seen = self._inline(self._policy_context, state, done, *proposed)
        ranking, policy_state = self._part(self.policy, seen)
        state, report = self._inline(self._choose, state, done, proposed[0], seen, ranking)
        if self.is_beside:
            state, report, readings = self._inline(self._with_room, self.given, state, report, readings)
        kept = {name: node for name, node in named(state).items() if name not in CONSTANT_FIELDS}
        of_logits = {**states, **of_filters}
        of_parts = {**of_logits, **rule_state, **of_probes, **drafter_state, **policy_state}
        return {**kept, "report": report, **readings, **seam, **of_parts}

    def _inline(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return inline_function(self.into, function, arguments, self.fake_mode)

    def _part(self, part: TracedPart, context: Any) -> tuple[Any, dict[str, fx.Node]]:
        return part.inline(self.into, context, self.fake_mode)

    def _read(self) -> _Read:
        """Pack, and run the model on T tokens."""
        packed, rows = self._inline(self._pack, self.state, self.ranges)
        fed = {**self.caches, **named(packed), "lengths": self.state.lengths, "logit_index": rows.index}
        hidden, logits, *layers = inline(self.into, self.model, fed)
        if packed.ancestors is not None and self.sizes.max_depth is None:
            _see_chains(self.into.graph)  # the target's attentions: no drafter yet
        with self.fake_mode:  # the model's graph knew its own T and R; the step's are the lengths of the ranges
            for node in (hidden, logits, *layers):
                size = "logit_range" if node is logits else "token_range"
                length, value = self.ranges[size].meta["val"].shape[0], node.meta["val"]
                node.meta["val"] = value.new_empty((length, value.shape[-1]))
        return _Read(packed, rows, {"hidden": hidden, **dict(zip(self.taps, layers, strict=True))}, logits)

    def _process(self, read: _Read, *, filters: bool) -> tuple[_Read, dict[str, fx.Node]]:
        """The logits after all processors that are filters, or all that are not; and their state."""
        states: dict[str, fx.Node] = {}
        for processor in self.processors:
            if processor.part.is_filter != filters:
                continue
            processed, state = self._part(processor, self._inline(self._logit_context, self.state, read))
            read, states = replace(read, logits=processed.logits), states | state
        return read, states

    def _logit_context(self, state: StepState, read: _Read) -> LogitContext:
        rows = read.rows
        return LogitContext(
            logits=read.logits,
            row_ids=rows.row_ids,
            nodes=rows.nodes,
            positions=rows.positions,
            history=state.history,
            known=state.known,
            prompt_lengths=state.prompt_lengths,
            limits=state.limits,
            draft=replace(state.draft, lengths=read.packed.drafted, proposal=None),
            is_eos=state.is_eos,
        )

    def _pack(self, state: StepState, ranges: Tensors) -> tuple[Packed, LogitRows]:
        packed = pack(
            state.history,
            state.known,
            state.lengths,
            state.active,
            ranges["token_range"],
            ranges["row_range"],
            share=self.sizes.num_draft_tokens + 1,
            draft=state.draft,
        )
        if self.batch.tree_nodes:
            packed = as_trees(packed, state.lengths, self.batch.ancestor_words, state.draft)
        return packed, logit_rows(packed, state.known, ranges["logit_range"])

    def _verification(self, state: StepState, read: _Read) -> Verification:
        rows = read.rows
        return Verification(
            logits=read.logits,
            offsets=rows.offsets,
            draft=replace(state.draft, lengths=read.packed.drafted),
            row_ids=rows.row_ids,
            seeds=state.seeds[rows.row_ids],
            positions=rows.positions,
            drawn=self.drawn,
        )

    def _commit(self, state: StepState, read: _Read, verdict: Verdict) -> tuple[StepState, _Done]:
        """Carry the verdict out, as far as it can be meant: only drafts are accepted, and only token ids emitted."""
        packed = read.packed
        verified = replace(state.draft, lengths=packed.drafted, proposal=None)
        accept_lengths = torch.where(packed.ready, feasible(verified, verdict), 0)  # [B]
        next_tokens = verdict.next_tokens.clamp(0, self.sizes.vocabulary - 1)  # [B]
        path, last = verdict.path, accept_lengths  # [B], the node whose logits chose the next token
        if path is not None:
            depth = torch.arange(path.shape[1], device=path.device)
            path = torch.where((depth > 0) & (depth <= accept_lengths[:, None]), path, 0)
            last = path.gather(1, last[:, None]).squeeze(1)
        verdict = replace(verdict, accept_lengths=accept_lengths, next_tokens=next_tokens, path=path, state={})
        new, emission = commit(state, packed, verdict)
        return new, _Done(emission, packed.ready, verified, path, last)

    def _move_kv(self, done: _Done) -> None:
        """Put the KV of accepted paths right behind the committed tokens."""
        if done.path is None:
            return
        starts, counts = self._inline(self._accepted, self.state, done)
        appended = [node for node in self.into.graph.nodes if node.target == append_kv]  # the target's: no drafter yet
        for keys, values in dict.fromkeys(tuple(node.args[:2]) for node in appended):
            call(self.into.graph, move_kv, keys, values, starts, done.path, counts)

    def _with_room(
        self, given: StepState, state: StepState, report: Tensor, readings: Tensors
    ) -> tuple[StepState, Tensor, Tensors]:
        """What a step without drafts leaves and tells, in the shapes of those beside it."""
        depth = given.draft.max_depth

        def wider(values: Tensor) -> Tensor:  # [B, 1, ...] -> [B, D + 1, ...]
            return torch.cat([values, values.new_zeros((values.shape[0], depth, *values.shape[2:]))], 1)

        return state.with_room(given), wider(report), {name: wider(values) for name, values in readings.items()}

    def _accepted(self, state: StepState, done: _Done) -> tuple[Tensor, Tensor]:
        """The slot of each row's root, and how many nodes follow it there, itself included."""
        return (state.known - 1).clamp(min=0), torch.where(done.ready, done.emission.accepted + 1, 0)

    def _probe(self, read: _Read, raw_logits: Tensor, done: _Done) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
        """What the probes tell, by the names of results; and their state."""
        readings: dict[str, fx.Node] = {}
        states: dict[str, fx.Node] = {}
        context = self._inline(self._probe_context, read, raw_logits, done) if self.probes else None
        for probe in self.probes:
            probed, state = self._part(probe, context)
            readings |= {f"{READING}{name}": node for name, node in probed.values.items()}
            states |= state
        return readings, states

    def _probe_context(self, read: _Read, raw_logits: Tensor, done: _Done) -> ProbeContext:
        tokens = done.emission.tokens
        path = torch.arange(tokens.shape[1], device=tokens.device) if done.path is None else done.path
        places = (read.rows.offsets[:-1, None] + path).clamp(max=raw_logits.shape[0] - 1)  # [B, D + 1]
        return ProbeContext(tokens, done.emission.counts, places, raw_logits, read.logits)

    def _draft_context(
        self, before: StepState, state: StepState, read: _Read, done: _Done, ranges: Tensors
    ) -> DraftContext:
        new, source = newly_read(before, state, read.packed, done.path)
        logits = None
        if self.reads_logits:
            last = read.rows.offsets[:-1] + done.last  # [B]
            logits = read.logits[last.clamp(max=read.logits.shape[0] - 1)]
        can_draft = state.active & done.ready  # [B]
        left = (state.limits - state.known - 1).clamp(0, self.sizes.depth)  # [B], one place is for the bonus token
        return DraftContext(
            history=state.history,
            known=state.known,
            hidden=read.taps["hidden"][read.packed.roots + done.last],
            active=state.active,
            can_draft=can_draft,
            max_drafts=torch.where(can_draft, left, 0),
            draft_range=ranges["draft_range"],
            row_range=ranges["row_range"],
            seeds=state.seeds,
            groups=state.groups,
            read=new,
            source=source,
            taps=read.taps,
            logits=logits,
            drawn=self.drawn,
            vocabulary=self.sizes.vocabulary,
        )

    def _propose(self, answer: Draft, max_drafts: Tensor) -> tuple[Nodes, Tensor]:
        """What the drafter proposes, and which of it can be verified, bool `[B, K]`."""
        tokens, parents, most = answer.tokens, answer.parents, self.sizes.num_grades - 1
        is_token = (tokens >= 0) & (tokens < self.sizes.vocabulary)  # [B, K]
        if parents is not None:
            is_token = is_token & (parents >= 0) & (parents <= torch.arange(tokens.shape[1], device=tokens.device))
            parents = torch.where(is_token, parents, 0)
        tokens = torch.where(is_token, tokens, 0)  # a dry run verifies K of them, whatever they are
        grades = torch.zeros_like(tokens) if answer.grades is None else answer.grades.clamp(0, most)
        proposal = answer.proposal if self.sizes.has_proposal else None
        draft = Nodes(tokens, answer.lengths, grades, parents, self.sizes.depth, proposal)
        return draft, proposed_drafts(draft, is_token, max_drafts)

    def _policy_context(self, state: StepState, done: _Done, draft: Nodes, proposed: Tensor) -> PolicyContext:
        """What is proposed, and what became of what was proposed before."""
        if draft.proposal is not None:  # whoever chose drafts by what they are would change what they are drawn from
            blank = torch.zeros_like(draft.tokens)
            draft = replace(draft, tokens=blank, grades=blank, proposal=None)
        tried, accepted = outcome(done.verified, done.path, done.emission.accepted)
        return PolicyContext(
            draft=draft,
            proposed=proposed,
            verified=done.verified,
            tried=tried,
            accepted=accepted,
            num_tokens=torch.where(state.active, state.known - state.lengths, 0).sum(),
            num_emitting=state.active.sum(),
            seconds=state.step_seconds,
        )

    def _choose(
        self, state: StepState, done: _Done, draft: Nodes, seen: PolicyContext, ranking: Ranking
    ) -> tuple[StepState, Tensor]:
        """Keep the drafts that are to be verified, and tell the host."""
        ranking = replace(ranking, wanted=ranking.wanted.clamp(0, draft.tokens.numel()))
        room = torch.minimum(ranking.wanted, state.draft_budget)  # []
        in_order = draft.proposal is not None and self.drawn == WITHOUT_REPLACEMENT
        draft = select(draft, fit(ranking, draft, seen.proposed, room, in_order=in_order))
        columns = {
            "counts": done.emission.counts,
            "active": state.active.to(torch.int64),
            "pending": state.known - state.lengths,
            "draft_lengths": draft.lengths,
            "wanted": ranking.wanted.expand(state.known.shape),
            "plain_counts": plain_counts(done.emission.counts, seen.verified.grades, seen.accepted, self.costly_grades),
        }
        return replace(state, draft=draft), make_report(done.emission.tokens, columns)


def sizes_of(batch: BatchShape, vocabulary: int, rule: Rule, drafter: Drafter) -> PartSizes:
    """The sizes of a step with this rule and this drafter."""
    has_proposal = rule.reads_proposal and how_drawn(rule, drafter) != DETERMINISTIC
    drafts = drafter.num_draft_tokens, drafter.num_grades, drafter.max_depth
    return PartSizes(batch.rows, batch.capacity, vocabulary, *drafts, has_proposal=has_proposal)


def _see_chains(graph: fx.Graph) -> None:
    """Where nothing is a tree each token sees all before it in its row: attention need not be told."""
    for node in graph.nodes:
        if node.target == ragged_attention:
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "ancestors"}
