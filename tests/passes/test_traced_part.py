"""`traced_part`: whatever a part does against its contract is refused when it is traced, by an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.acceptance import GreedyMatch, Rule, Verdict, Verification
from emssd_compile.compiler import _copy, compile_step
from emssd_compile.drafters import Draft, DraftContext, Drafter, NoDrafter, PartSizes, TensorSpec
from emssd_compile.errors import DrafterError, PartError, PolicyError, ProbeError, RuleError
from emssd_compile.passes.fuse_step import FuseStep
from emssd_compile.passes.graph import inputs
from emssd_compile.policies import AllDrafts, LengthPolicy, PolicyContext, Ranking
from emssd_compile.probes import Probe, ProbeContext, Probed, ReadingSpec
from tests.passes.graphs import BATCH, compiled_model, returned, step_with

B, K = BATCH.rows, 2
LINE = {"seen": TensorSpec((B,), torch.int64)}
CACHE = {"cache": TensorSpec((B, 4), torch.float32, kept="forever", in_place=True)}
Change = Callable[[Any, Any], Any]
"""(context, answer) -> what the part returns instead; it may write to the context."""


class _Drafter(Drafter):
    num_draft_tokens = K
    weight: Tensor

    def __init__(self, change: Change, tensors: Any = None) -> None:
        super().__init__()
        self.change, self.declared = change, tensors or {}
        self.register_buffer("weight", torch.zeros(B, dtype=torch.int64))

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return self.declared

    def forward(self, context: DraftContext) -> Draft:
        state = {name: context.state[name] for name, spec in self.declared.items() if not spec.in_place}
        tokens = context.known.new_zeros((B, K))
        return self.change(context, Draft(tokens, context.known * 0 + K, state, grades=tokens + 0))


class _Rule(Rule):
    guarantees = "tokens"

    def __init__(self, change: Change, tensors: Any = None) -> None:
        super().__init__()
        self.change, self.declared, self.greedy = change, tensors or {}, GreedyMatch()

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return self.declared

    def forward(self, verification: Verification) -> Verdict:
        return self.change(verification, replace(self.greedy(verification), state=dict(verification.state)))


class _Probe(Probe):
    def __init__(self, change: Change, tensors: Any = None, readings: Any = None) -> None:
        super().__init__()
        self.change, self.declared, self.told = change, tensors or {}, readings or {"seconds": ReadingSpec()}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        return self.told

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return self.declared

    def forward(self, context: ProbeContext) -> Probed:
        return self.change(context, Probed({"seconds": context.tokens.float()}, dict(context.state)))


class _Policy(LengthPolicy):
    def __init__(self, change: Change, tensors: Any = None) -> None:
        super().__init__()
        self.change, self.declared, self.all = change, tensors or {}, AllDrafts()

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return self.declared

    def forward(self, context: PolicyContext) -> Ranking:
        return self.change(context, replace(self.all(context), state=dict(context.state)))


KINDS: dict[str, tuple[Callable[..., Any], type[PartError]]] = {
    "drafter": (_Drafter, DrafterError),
    "rule": (_Rule, RuleError),
    "policy": (_Policy, PolicyError),
    "probe": (_Probe, ProbeError),
}
INPUTS = {"probe": "probe_0"}  # of which there may be several: what its tensors' names begin with


def _trace(kind: str, part: Any) -> None:
    """Fuse the part in, and do no more: quicker than `step_with`."""
    parts = {"rule": GreedyMatch(), "drafter": _Drafter(lambda _, a: a), "policy": AllDrafts(), kind: part}
    if "probe" in parts:
        parts["probes"] = {0: parts.pop("probe")}
    FuseStep(BATCH, **parts, fake_mode=compiled_model().fake_mode).run(_copy(compiled_model().graph_module, "Step"))


class _TreeDrafter(_Drafter):
    """One whose trees are as deep as they are large."""

    max_depth = K


TREES: dict[str, tuple[str, str, Change]] = {
    "no parents": ("drafter", "parents = None; expected a tensor", lambda _, a: replace(a, parents=None)),
    "parents of a row": ("drafter", r"parents of shape \(3,\)", lambda _, a: replace(a, parents=a.lengths)),
    "bool parents": ("drafter", r"parents of dtype torch\.bool", lambda _, a: replace(a, parents=a.tokens > 0)),
    "no path": ("rule", "path = None; expected a tensor", lambda _, a: replace(a, path=None)),
    "a path without the root": (
        "rule",
        r"path of shape \(3, 2\); expected \[B, D \+ 1\] = \[3, 3\]",
        lambda _, a: replace(a, path=a.path[:, 1:]),
    ),
    "an int32 path": ("rule", r"path of dtype torch\.int32", lambda _, a: replace(a, path=a.path.int())),
}


@pytest.mark.parametrize("name", TREES)
def test_where_drafts_are_trees_they_have_parents_and_what_is_accepted_a_path(name):
    kind, message, change = TREES[name]
    trees = _TreeDrafter(lambda _, answer: replace(answer, parents=answer.tokens))
    part = {"drafter": _TreeDrafter(change), "rule": _Rule(change)}[kind]
    parts: dict[str, Any] = {"rule": GreedyMatch(), "drafter": trees, "policy": AllDrafts(), kind: part}
    step = FuseStep(BATCH, **parts, fake_mode=compiled_model().fake_mode)
    with pytest.raises(KINDS[kind][1], match=f"(?s){message}"):
        step.run(_copy(compiled_model().graph_module, "Step"))


def _refused(kind: str, message: str, change: Change = lambda _, answer: answer, tensors: Any = None) -> None:
    make, error = KINDS[kind]
    with pytest.raises(error, match=f"(?s)^_{kind.capitalize()}.*{message}") as caught:
        _trace(kind, make(change, tensors))
    assert type(caught.value) is error


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_keeps_its_contract_is_taken(kind):
    step_with(**{kind: KINDS[kind][0](lambda _, answer: answer, LINE)})


def _writing(write: Callable[[Any], Any]) -> Change:
    def change(context: Any, answer: Any) -> Any:
        write(context)
        return answer

    return change


WRITES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "history": ("drafter", r"writes to context\.history in place, with aten\.fill_", lambda c: c.history.fill_(0)),
    "known": ("drafter", r"context\.known in place, with aten\.add_", lambda c: c.known.add_(1)),
    "active": ("drafter", r"context\.active in place", lambda c: c.active.fill_(True)),
    "can_draft": ("drafter", r"context\.can_draft in place", lambda c: c.can_draft.logical_not_()),
    "max_drafts": ("drafter", r"context\.max_drafts in place", lambda c: c.max_drafts.clamp_(max=1)),
    "hidden": ("drafter", r"context\.hidden in place", lambda c: c.hidden.zero_()),
    "a view": ("drafter", r"context\.history in place", lambda c: c.history.view(-1)[3:].mul_(2)),
    "an item": ("drafter", r"context\.history in place", lambda c: c.history.__setitem__((0, slice(3)), 1)),
    "by index": ("drafter", r"context\.history in place", lambda c: c.history.index_put_((c.known * 0,), c.known[0])),
    "detached": ("drafter", r"context\.known in place", lambda c: c.known.detach().add_(1)),
    "data": ("drafter", r"context\.known in place", lambda c: c.known.data.add_(1)),
    "out": ("drafter", r"context\.known in place", lambda c: torch.add(c.known, 1, out=c.known)),
    "foreach": ("drafter", r"context\.(known|max_drafts) in place", lambda c: torch._foreach_add_([c.known], 1)),
    "resize": ("drafter", r"context\.known in place", lambda c: c.known.resize_(1)),
    "logits": ("rule", r"context\.logits in place", lambda c: c.logits.masked_fill_(c.logits > 0, 1.0)),
    "draft tokens": ("rule", r"context\.draft\.tokens in place", lambda c: c.draft.tokens.zero_()),
    "seconds": ("policy", r"context\.seconds in place", lambda c: c.seconds.fill_(1.0)),
    "tokens": ("probe", r"context\.tokens in place", lambda c: c.tokens.fill_(0)),
    "raw logits": ("probe", r"context\.(raw_)?logits in place", lambda c: c.raw_logits.zero_()),
    "proposed": ("policy", r"context\.proposed in place", lambda c: c.proposed.fill_(True)),
    "grades": ("policy", r"context\.verified\.grades in place", lambda c: c.verified.grades.add_(1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_context_is_read_only(name):
    kind, message, write = WRITES[name]
    _refused(kind, message, _writing(write))


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_returned_and_not_written(kind):
    _refused(kind, r"context\.state\['seen'\] in place", _writing(lambda c: c.state["seen"].add_(1)), LINE)


class _Forgetful(_Drafter):
    def forward(self, context: DraftContext) -> Draft:
        self.weight[1:].add_(1)
        return super().forward(context)


def test_a_part_does_not_change_its_weights():
    with pytest.raises(DrafterError, match=r"_Forgetful.forward writes to its own 'weight' in place"):
        _trace("drafter", _Forgetful(lambda _, answer: answer))


OUTSIDE = torch.zeros(B, dtype=torch.int64)


def test_a_part_does_not_change_tensors_from_outside():
    _refused("drafter", "writes to a tensor from outside in place", _writing(lambda _: OUTSIDE.add_(1)))
    assert not OUTSIDE.any()


def test_a_part_may_write_to_what_it_makes_and_to_what_it_declares_as_written_in_place():
    def write(context: DraftContext) -> None:
        (context.known + 1).add_(1)
        torch.tensor([1, 2]).fill_(3)
        context.state["cache"].fill_(1.0)

    step = step_with(_Drafter(_writing(write), CACHE))
    assert step.roles["drafter_cache"] == "cache"
    assert "drafter_cache" not in returned(step.graph_module)
    assert "aten.fill_.Scalar" in {str(node.target) for node in step.graph_module.graph.nodes}


OTHERS: dict[str, tuple[str, str, Change]] = {
    "a tuple": ("drafter", "returned a tuple; expected a Draft", lambda _, answer: (answer.tokens, answer.lengths)),
    "nothing": ("rule", "returned a NoneType; expected a Verdict", lambda _, answer: None),
    "its values": ("probe", "returned a dict; expected a Probed", lambda _, answer: answer.values),
    "a tensor": ("policy", "returned a Tensor; expected a Ranking", lambda _, answer: answer.ranks),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_answer_is_of_its_dataclass(name):
    _refused(*OTHERS[name])


ELSEWHERE = torch.zeros(B, dtype=torch.int64, device="meta")
FIELDS: dict[str, tuple[str, str, str, Change]] = {
    "int32 tokens": ("drafter", "tokens", r"tokens of dtype torch\.int32; expected torch\.int64", lambda _, v: v.int()),
    "float tokens": ("drafter", "tokens", r"tokens of dtype torch\.float32", lambda _, v: v.float()),
    "one token": ("drafter", "tokens", r"of shape \(3, 1\); expected \[B, K\] = \[3, 2\]", lambda _, v: v[:, 1:]),
    "a list": ("drafter", "tokens", r"tokens = \[\[1, 2\]\]; expected a tensor", lambda _, v: [[1, 2]]),
    "a column": ("drafter", "lengths", r"of shape \(3, 1\); expected \[B\] = \[3\]", lambda _, v: v[:, None]),
    "one length for all": ("drafter", "lengths", r"lengths of shape \(\)", lambda _, v: v[0]),
    "bool lengths": ("drafter", "lengths", r"lengths of dtype torch\.bool", lambda _, v: v > 0),
    "no lengths": ("drafter", "lengths", "lengths = None; expected a tensor", lambda _, v: None),
    "a size of the step": ("drafter", "lengths", "lengths of shape", lambda c, _: c.draft_range),
    "another device": ("drafter", "lengths", "lengths on meta; expected it on cpu", lambda _, v: ELSEWHERE),
    "float grades": ("drafter", "grades", r"grades of dtype torch\.float64", lambda _, v: v.double()),
    "a grade a row": ("drafter", "grades", r"grades of shape \(3,\)", lambda _, v: v[:, 0]),
    "parents of chains": (
        "drafter",
        "parents",
        "parents, but the drafts are chains: return None",
        lambda _, v: 1,
    ),
    "a path of chains": (
        "rule",
        "path",
        "path, but the drafts are chains: return None",
        lambda c, _: c.offsets,
    ),
    "a column of lengths": ("rule", "accept_lengths", r"of shape \(3, 1\); expected \[B\]", lambda _, v: v[:, None]),
    "float accept lengths": ("rule", "accept_lengths", r"of dtype torch\.float32", lambda _, v: v.float()),
    "all choices": ("rule", "next_tokens", "next_tokens of shape", lambda c, _: c.logits.argmax(-1)),
    "int32 next tokens": ("rule", "next_tokens", r"next_tokens of dtype torch\.int32", lambda _, v: v.int()),
    "transposed ranks": ("policy", "ranks", r"shape \(2, 3\); expected \[B, K\] = \[3, 2\]", lambda _, v: v.T),
    "float ranks": ("policy", "ranks", r"ranks of dtype torch\.float32", lambda _, v: v.float()),
    "wanted by row": ("policy", "wanted", r"of shape \(3,\); expected \[\] = \[\]", lambda c, _: c.draft.lengths),
    "a number": ("policy", "wanted", "wanted = 3; expected a tensor", lambda _, v: 3),
    "float wanted": ("policy", "wanted", r"wanted of dtype torch\.float32", lambda _, v: v.float()),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_an_answer_has_its_shape_and_dtype(name):
    kind, field, message, make = FIELDS[name]
    _refused(kind, message, lambda context, answer: replace(answer, **{field: make(context, getattr(answer, field))}))


def _state(make: Callable[[Tensor], Any]) -> Change:
    return lambda context, answer: replace(answer, state={"seen": make(context.state["seen"])})


def _more(context: Any, answer: Any) -> Any:
    return replace(answer, state={**answer.state, "more": answer.state["seen"]})


STATES: dict[str, tuple[str, Change]] = {
    "missing": (r"returned state \[\]; it declares \['seen'\]", lambda c, a: replace(a, state={})),
    "undeclared": (r"returned state \['more', 'seen'\]; it declares", _more),
    "no dict": ("returned state list; it declares", lambda c, a: replace(a, state=[])),
    "names that are no strings": (r"returned state \['3'\]", lambda c, a: replace(a, state={3: a.state["seen"]})),
    "longer": (r"state 'seen' of shape \(6,\); expected \[3\], as declared", _state(lambda t: torch.cat([t, t]))),
    "shorter": (r"state 'seen' of shape \(1,\)", _state(lambda t: t[:1])),
    "another dimension": (r"state 'seen' of shape \(3, 1\)", _state(lambda t: t[:, None])),
    "int32": (r"state 'seen' of dtype torch\.int32; expected torch\.int64", _state(lambda t: t.int())),
    "float": (r"state 'seen' of dtype torch\.float32", _state(lambda t: t / 2)),
    "bool": (r"state 'seen' of dtype torch\.bool", _state(lambda t: t > 0)),
    "no tensor": ("state 'seen' = 0; expected a tensor", _state(lambda t: 0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STATES)
def test_state_that_comes_back_is_what_was_declared(name, kind):
    message, change = STATES[name]
    _refused(kind, message, change, LINE)


def test_what_is_written_in_place_is_not_returned():
    change = lambda c, a: replace(a, state={"cache": c.state["cache"]})  # noqa: E731
    _refused("drafter", r"returned state \['cache'\]; it declares \[\]", change, CACHE)


def _raising(context: Any, answer: Any) -> Any:
    raise RuntimeError("no idea\nand more")


def _reading(context: Any, answer: Any) -> Any:
    first = next(value for value in vars(context).values() if isinstance(value, Tensor))
    return answer if first.sum() > 3 else None


def _item(context: Any, answer: Any) -> Any:
    next(value for value in vars(context).values() if isinstance(value, Tensor)).flatten()[0].item()
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_raises_or_reads_to_the_host_is_named(kind):
    _refused(kind, f"failed while it was traced: RuntimeError: no idea. A {kind}'s forward may hold", _raising)
    _refused(kind, "reads a value to the host, as with .item()", _reading)
    _refused(kind, "reads a value to the host, as with .item()", _item)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_whose_declaration_raises_is_named(kind, monkeypatch):
    make, error = KINDS[kind]

    def tensors(self: object, sizes: PartSizes) -> None:
        raise KeyError("rows")

    monkeypatch.setattr(make, "tensors", tensors)
    with pytest.raises(error, match="`tensors` failed: KeyError: 'rows'"):
        _trace(kind, make(lambda _, answer: answer))


NAMES = ("hidden", "lengths", "known", "report", "history", "k_cache_0", "token_range", "state", "tokens", "if", "_")


@pytest.mark.parametrize("kind", KINDS)
def test_no_name_of_a_parts_tensor_meets_one_of_the_step(kind):
    declared = {name: TensorSpec((B, size), torch.int64) for size, name in enumerate(NAMES, 1)}
    seen: dict[str, Tensor] = {}

    def change(context: Any, answer: Any) -> Any:
        seen.update(context.state)
        return replace(answer, state={name: value + 1 for name, value in context.state.items()})

    step = step_with(**{kind: KINDS[kind][0](change, declared)})
    names = [str(node.target) for node in inputs(step.graph_module.graph)]
    assert len(names) == len({*names})
    assert {name: tuple(value.shape) for name, value in seen.items()} == {n: s.shape for n, s in declared.items()}
    assert {f"{INPUTS.get(kind, kind)}_{name}" for name in NAMES} <= {*names} & {*returned(step.graph_module)}


def test_parts_of_each_kind_may_call_their_tensors_alike():
    parts = {kind: make(lambda _, answer: answer, LINE) for kind, (make, _) in KINDS.items()}
    roles = step_with(**parts).roles
    assert [roles[f"{INPUTS.get(kind, kind)}_seen"] for kind in KINDS] == ["row"] * len(KINDS)


def test_roles_are_what_was_declared():
    learned = {"learned": TensorSpec((5,), torch.float32, kept="forever")}
    told = {"told": TensorSpec((7,), torch.int32, kept="host")}

    def change(_: Any, answer: Any) -> Any:
        return replace(answer, state={name: value for name, value in answer.state.items() if name != "told"})

    step = step_with(_Drafter(change, {**LINE, **learned, **told, **CACHE}))
    names = ("seen", "learned", "told", "cache")
    assert [step.roles[f"drafter_{name}"] for name in names] == ["row", "memory", "host", "cache"]
    assert [step.roles[n] for n in ("k_cache_0", "history", "limits", "draft_range")] == [
        *("cache", "state", "setting", "size")
    ]
    assert "drafter_told" not in returned(step.graph_module), "the step reads it only"


def test_state_comes_back_as_contiguous_memory():
    """The next step's compiled code reads it as such, whatever strides the part gave it."""
    tensors = {"wide": TensorSpec((B, K), torch.int64), "flat": TensorSpec((B, K), torch.int64)}

    def change(context: Any, answer: Any) -> Any:
        wide = context.state["wide"].T.contiguous().T + 1
        return replace(answer, state={"wide": wide, "flat": context.known[:, None].expand(B, K)})

    step = step_with(_Drafter(change, tensors)).graph_module
    for name in ("drafter_wide", "drafter_flat"):
        assert returned(step)[name].meta["val"].is_contiguous()


def test_a_weight_may_be_the_answer():
    drafter = _Drafter(lambda c, a: replace(a, lengths=drafter.weight))
    step_with(drafter)


def _value(make: Callable[[Tensor], Any]) -> Change:
    return lambda context, answer: replace(answer, values={"seconds": make(answer.values["seconds"])})


VALUES: dict[str, tuple[str, Change]] = {
    "none": (r"values \[\]; it declares \['seconds'\]", lambda c, a: replace(a, values={})),
    "more": (r"values \['hours', 'seconds'\]", lambda c, a: replace(a, values={**a.values, "hours": c.tokens})),
    "a list": ("values list; it declares", lambda c, a: replace(a, values=[])),
    "of rows": (
        r"value 'seconds' of shape \(3,\); expected \[B, D \+ 1, \*shape\] = \[3, 3\]",
        _value(lambda v: v[:, 0]),
    ),
    "float64": (r"value 'seconds' of dtype torch\.float64; expected torch\.float32", _value(lambda v: v.double())),
    "a number": ("value 'seconds' = 3; expected a tensor", _value(lambda v: 3)),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_a_probe_tells_is_what_it_declares(name):
    _refused("probe", *VALUES[name])


READINGS: dict[str, tuple[str, Any]] = {
    "none": ("return a dict of ReadingSpecs by name, at least one", lambda self, sizes: {}),
    "a list": ("returned \\[\\]; return a dict", lambda self, sizes: []),
    "a name with a blank": ("declares 'a b'; name it as an attribute", lambda self, sizes: {"a b": ReadingSpec()}),
    "the sequences": ("declares 'sequences'; name it as", lambda self, sizes: {"sequences": ReadingSpec()}),
    "a method": ("declares 'keys'; name it as", lambda self, sizes: {"keys": ReadingSpec()}),
    "a word of Python": ("declares 'class'; name it as", lambda self, sizes: {"class": ReadingSpec()}),
    "itself": ("declares 'self'; name it as", lambda self, sizes: {"self": ReadingSpec()}),
    "a shape": ("declares 'n': a tuple is no ReadingSpec", lambda self, sizes: {"n": (3,)}),
    "a negative size": ("declares 'n': shape", lambda self, sizes: {"n": ReadingSpec((-1,))}),
    "a dtype by name": ("declares 'n': dtype 'int'", lambda self, sizes: {"n": ReadingSpec((), "int")}),  # type: ignore[arg-type]
    "an option of nobody": ("asked_by='n' is no option of it", lambda self, sizes: {"n": ReadingSpec(asked_by="n")}),
    "a cut number": ("is_cut needs asked_by, and a size", lambda self, sizes: {"n": ReadingSpec(is_cut=True)}),
    "an error": ("`readings` failed: AttributeError", lambda self, sizes: sizes.nothing),
}


@pytest.mark.parametrize("name", READINGS)
def test_what_a_probe_declares_makes_sense(name, monkeypatch):
    message, readings = READINGS[name]
    monkeypatch.setattr(_Probe, "readings", readings)
    _refused("probe", message)


def test_two_probes_do_not_tell_of_the_same():
    probes = (_Probe(lambda _, a: a), _Probe(lambda _, a: a))
    with pytest.raises(ProbeError, match="two probes tell of 'seconds'; give one of them another name"):
        compile_step(compiled_model(), GreedyMatch(), NoDrafter(), AllDrafts(), probes=probes)


ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "K negative": ({"num_draft_tokens": -1}, r"num_draft_tokens = -1; set it to an integer of at least 0"),
    "K float": ({"num_draft_tokens": 2.0}, r"num_draft_tokens = 2\.0"),
    "K bool": ({"num_draft_tokens": True}, "num_draft_tokens = True"),
    "K missing": ({"num_draft_tokens": None}, "num_draft_tokens = None"),
    "G 0": ({"num_grades": 0}, "num_grades = 0; set it to an integer of at least 1"),
    "G float": ({"num_grades": 1.5}, r"num_grades = 1\.5"),
    "reads_ahead": ({"reads_ahead": 1}, "reads_ahead = 1; set it to True or False"),
    "proposes nothing": ({"proposes": ()}, r"proposes = \(\); set it to a tuple of some of"),
    "proposes": ({"proposes": ("drawn",)}, "proposes = .*'without replacement'"),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_a_drafter_are_checked(name):
    changes, message = ATTRIBUTES[name]
    drafter = NoDrafter()
    for attribute, value in changes.items():
        setattr(drafter, attribute, value)
    with pytest.raises(DrafterError, match=f"NoDrafter.{message}"):
        step_with(drafter)


def test_a_rule_says_what_it_guarantees():
    rule = GreedyMatch()
    rule.guarantees = "all"
    with pytest.raises(RuleError, match=r"GreedyMatch\.guarantees = 'all'; set it to one of"):
        step_with(rule=rule)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_depend_on_values_are_the_parts_fault(kind):
    sized = {"drafter": "known", "rule": "offsets", "policy": "proposed", "probe": "places"}[kind]
    _refused(kind, "makes a shape that depends on values", _writing(lambda c: getattr(c, sized).nonzero()))


def test_what_a_part_keeps_in_itself_is_refused_and_undone():
    drafter = _Drafter(lambda context, answer: answer)

    def keep(context: Any, answer: Any) -> Any:
        drafter.weight = drafter.weight + context.known
        return answer

    drafter.change = keep
    before = drafter.weight
    with pytest.raises(DrafterError, match="keeps 'weight' in itself"):
        step_with(drafter=drafter)
    assert drafter.weight is before
