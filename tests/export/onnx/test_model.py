"""`write_model`: a valid model of standard operators that decodes what was exported, or a refusal that says where."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.drafters import Draft, DraftContext, Drafter, PartSizes, TensorSpec
from emssd_compile.errors import ArtifactError, OptionError, UnsupportedModelError
from emssd_compile.export import open_graph
from emssd_compile.export.onnx import model as onnx_model
from emssd_compile.export.onnx.session import open_session
from emssd_compile.passes.graph import aten, call, output
from emssd_compile.passes.manager import PassManager
from emssd_compile.step.signature import Signature
from tests.exactness.compiled import assert_exact, target
from tests.exactness.models import prompt
from tests.export.opened import files_of, signature_of
from tests.passes.graphs import BATCH, COMMITTED, LONGEST, ROWS, TinyModel, alone, causal, model_with_attention
from tests.passes.trees import assert_same, break_draft, spread, step_inputs, tiled_inputs, tree_batch, tree_graph

ROWS_OF_STEP, NEW = 3, 8
OPTIONS = onnx_model.ModelOptions()
PROMPTS = [prompt(n) for n in (61, 1, 17, 5)]


class Alternating(Drafter):
    """Repeats the newest token every second time; its state goes in and comes out, one tensor of it as it came."""

    num_draft_tokens = 2

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        """`turn[B]` counts steps, `kept[B]` never changes."""
        return {"turn": TensorSpec((sizes.rows,), torch.int64), "kept": TensorSpec((sizes.rows,), torch.float32)}

    def forward(self, context: DraftContext) -> Draft:
        """The newest token twice, in every other step."""
        newest = context.history.gather(1, (context.known - 1).clamp(min=0)[:, None])
        turn = context.state["turn"] + 1
        return Draft(newest.expand(-1, 2), turn % 2 * 2, {"turn": turn, "kept": context.state["kept"]})


# Learned positions, rotary ones and a window, ALiBi. Other kinds of drafters: tests/exactness/test_targets.py.
CASES = {
    "gpt2": "prompt-lookup",
    "mistral": "sometimes-wrong",
    "bloom": "alternating",
}


@pytest.mark.parametrize(("architecture", "drafter"), CASES.items())
def test_the_tokens_are_the_models_own(architecture, drafter, tmp_path):
    compiled = target(architecture, ROWS_OF_STEP)
    fast = compiled.optimize(Alternating() if drafter == "alternating" else compiled.drafter(drafter))
    fast.export_onnx(tmp_path / "artifact")
    loaded = emssd_compile.load(tmp_path / "artifact")
    assert_exact(loaded, compiled.reference, PROMPTS, NEW)  # type: ignore[arg-type]
    assert loaded.stats.num_draft_tokens > 0
    _check_form(tmp_path / "artifact" / "step.onnx", compiled.model)


def _check_form(path: Path, model: nn.Module) -> None:
    """Standard operators, each weight once (gpt2's and bloom's are tied), nothing about the machine it was made on."""
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert [(imported.domain, imported.version) for imported in loaded.opset_import] == [("", 24)]
    assert not loaded.functions
    assert {node.domain for node in loaded.graph.node} == {""}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    initialisers = sum(len(tensor.raw_data) for tensor in loaded.graph.initializer)
    assert initialisers < 1.1 * weights
    assert not [node for node in loaded.graph.node if node.metadata_props or node.doc_string]
    here = (sys.prefix, str(Path(__file__).parents[3]), str(Path(torch.__file__).parent), "site-packages")
    assert not [place for place in here if place.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model and its exported form, alone."""
    model = model_with_attention()
    fast = emssd_compile.optimize(model, "none", max_batch=BATCH.rows, max_length=LONGEST, backend="eager")
    folder = tmp_path_factory.mktemp("onnx") / "artifact"
    fast.export_onnx(folder, verify_only=True)
    return model, folder


@pytest.mark.parametrize("tail", [0, 3])
def test_the_model_without_the_step_around_it(tiny, tail):
    """Rows without a token, inert tail tokens, sizes that are equal and sizes that are not."""
    model, folder = tiny
    graph = open_graph(folder)
    tensors = graph.empty("cache")
    lengths = torch.zeros(BATCH.rows, dtype=torch.int64)
    for fed in (COMMITTED, ROWS):
        found = graph(**tensors, **_packed(fed, lengths, tail))
        lengths = lengths + torch.tensor([len(row) for row in fed])
    torch.testing.assert_close(found["logits"], alone(model), rtol=1e-5, atol=1e-5)


def _packed(fed: list[Tensor], lengths: Tensor, tail: int) -> dict[str, Tensor]:
    counts = torch.tensor([len(row) for row in fed])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    live = torch.arange(BATCH.rows).repeat_interleave(counts)
    nothing = torch.zeros(tail, dtype=torch.int64)
    return {
        "input_ids": torch.cat([*fed, nothing]),
        "positions": torch.cat([torch.arange(len(live)) - offsets[live] + lengths[live], nothing]),
        "row_ids": torch.cat([live, nothing + BATCH.rows]),
        "offsets": offsets,
        "lengths": lengths,
        "logit_index": torch.arange(len(live)),
        "row_range": torch.arange(int(counts.max())),
    }


def test_draft_trees_in_onnx_runtime(tmp_path):
    """Masks from bits, in operators of the standard; a draft that overflows, in caches full of NaN."""
    given = step_inputs(tree_batch())
    break_draft(given)
    graph_module, fake_mode = tree_graph(given)
    tiled = tiled_inputs(given, 43)
    expected = graph_module(*given.values())
    for step in onnx_model.passes((), OPTIONS):
        PassManager(fake_mode)._run(step, "onnx", graph_module)
    signature = signature_of(graph_module)
    details = onnx_model.write_model(graph_module, tmp_path, (), OPTIONS, signature)
    assert set(details["in_place"]) == {name for name in given if "_cache_" in name}
    with files_of(tmp_path) as files:
        session = open_session(files, details, signature, torch.device("cpu"))
    assert_same(spread(session(*(tiled[binding.name] for binding in signature.inputs))), spread(expected))


def test_a_result_of_a_size_that_no_input_has_is_refused(tmp_path):
    graph_module, fake_mode = tree_graph(step_inputs(tree_batch()))
    for step in onnx_model.passes((), OPTIONS):
        PassManager(fake_mode)._run(step, "onnx", graph_module)
    results = output(graph_module.graph).args[0]
    assert isinstance(results, dict)
    with graph_module.graph.inserting_before(output(graph_module.graph)):
        results = results | {"twice": call(graph_module.graph, aten.cat.default, [results["out_0"]] * 2)}
    output(graph_module.graph).args = (results,)
    with pytest.raises(UnsupportedModelError, match=r"a result's size is 2\*\w+, which is not .*aten.cat.default"):
        onnx_model.write_model(graph_module, tmp_path, (), OPTIONS, Signature((), ()))


def _igamma(model: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return torch.igamma(x.abs() + 1, x.abs())


def _bessel(model: TinyModel, x: Tensor, ids: Tensor) -> Tensor:
    return torch.special.i0e(x)


@pytest.mark.parametrize(("local", "op"), [(_igamma, "aten.igamma.default"), (_bessel, "aten.special_i0e.default")])
def test_an_op_that_onnx_does_not_have_is_named(local, op, tmp_path):
    """Also one that the exporter takes apart first, and fails at a part of."""
    model = TinyModel(local, causal)
    fast = emssd_compile.optimize(model, "none", max_batch=2, max_length=LONGEST, backend="eager")
    with pytest.raises(UnsupportedModelError, match="ONNX's operators do not express it") as raised:
        fast.export_onnx(tmp_path / "artifact", verify_only=True)
    assert (raised.value.op, raised.value.module) == (op, "model (TinyModel)")
    assert raised.value.node in {node.name for node in fast.graph_module.graph.nodes}
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("opset", [18, 23, 99])
def test_another_opset_is_refused(opset, tmp_path):
    fast = emssd_compile.optimize(model_with_attention(), "none", max_batch=2, max_length=8, backend="eager")
    with pytest.raises(OptionError, match=f"opset_version={opset}.*pass 24"):
        fast.export_onnx(tmp_path / "artifact", opset_version=opset)


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_what_installs_it_before_any_work(library, monkeypatch, tmp_path):
    fast = emssd_compile.optimize(model_with_attention(), "none", max_batch=2, max_length=8, backend="eager")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("emssd_compile.exporting.apply_target_passes", None)
    with pytest.raises(ArtifactError, match=rf'{library} cannot be .* pip install "emssd_compile\[onnx\]"'):
        fast.export_onnx(tmp_path / "artifact")


def test_writing_needs_nothing_that_runs_it(monkeypatch, tmp_path):
    fast = emssd_compile.optimize(model_with_attention(), "none", max_batch=2, max_length=8, backend="eager")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fast.export_onnx(tmp_path / "artifact", check=False)
    with pytest.raises(ArtifactError, match="onnxruntime cannot be imported"):
        emssd_compile.load(tmp_path / "artifact")
