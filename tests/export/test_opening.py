"""`opening`: an artifact runs where it was made for, as a decoder or as a function of tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import emssd_compile
from emssd_compile.errors import ArtifactError, InvalidInputError, OptionError
from emssd_compile.export import LoadedGraph, open_graph
from emssd_compile.export.folder import read_manifest
from tests.export import toy
from tests.export.toy import export

pytestmark = pytest.mark.usefixtures("toy_target")


def test_another_machine_is_named(artifact, monkeypatch):
    monkeypatch.setitem(toy.ENVIRONMENT, "weather", "rain")
    with pytest.raises(ArtifactError, match="made for weather fine, here it is rain"):
        emssd_compile.load(artifact)


def test_a_device_that_the_target_does_not_run_on_is_refused(artifact):
    with pytest.raises(OptionError, match="runs on cpu, not on cuda"):
        emssd_compile.load(artifact, device="cuda")


@pytest.mark.parametrize("device", ["gpu", 3.5])
def test_a_device_that_does_not_exist_is_refused(artifact, device):
    with pytest.raises(OptionError, match="none that torch knows"):
        emssd_compile.load(artifact, device=device)


@pytest.mark.parametrize("folder", [None, 3, b"somewhere"])
def test_what_is_no_path_is_refused(folder):
    with pytest.raises(OptionError, match="pass the path of an artifact"):
        emssd_compile.load(folder)


@pytest.fixture(scope="module")
def verify_inputs():
    """Rows of 3 and 1 tokens behind 0 and 2 committed ones, and an inert tail token."""
    return {
        "input_ids": torch.tensor([5, 6, 7, 9, 0]),
        "positions": torch.tensor([0, 1, 2, 2, 0]),
        "row_ids": torch.tensor([0, 0, 0, 1, 2]),
        "offsets": torch.tensor([0, 3, 4]),
        "lengths": torch.tensor([0, 2]),
        "logit_index": torch.tensor([2, 3]),
    }


def test_a_verify_only_graph_is_for_loops_of_ones_own(fast, tmp_path, verify_inputs):
    folder = export(fast, tmp_path / "verify", verify_only=True)
    with pytest.raises(ArtifactError, match="open_graph"):
        emssd_compile.load(folder)
    assert "fuse_step" not in {r["name"] for r in read_manifest(folder).explanation["records"]}
    graph = open_graph(folder)
    with pytest.raises(OptionError, match="role='caches' is none"):
        graph.empty("caches")
    results = graph(**verify_inputs, **graph.empty("cache"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(results["logits"][0], fast.model(ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert results["hidden"].shape[0] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "missing or unknown: input_ids"),
        ({"ids": torch.zeros(5)}, "missing or unknown: ids"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions has shape \[4\]"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"offsets": torch.zeros(3, 1, dtype=torch.int64)}, "offsets has shape"),
        ({"row_ids": torch.zeros(5, 2, dtype=torch.int64)[:, 0]}, "row_ids is not contiguous"),
    ],
)
def test_wrong_inputs_of_a_graph_are_named(fast, tmp_path, verify_inputs, change, message):
    graph = open_graph(export(fast, tmp_path / "verify", verify_only=True))
    given = {name: value for name, value in {**verify_inputs, **change}.items() if value is not None}
    with pytest.raises(InvalidInputError, match=message):
        graph(**given, **graph.empty("cache"))


def test_a_tensor_on_another_device_of_the_kind_is_refused(fast, tmp_path, verify_inputs):
    manifest = read_manifest(export(fast, tmp_path / "verify", verify_only=True))
    with FakeTensorMode(allow_non_fake_inputs=True):  # makes believe that there are several
        graph = LoadedGraph(manifest, torch.device("cuda"), lambda *inputs: {"all": inputs[0]})
        given = {name: value.to("cuda:0") for name, value in verify_inputs.items()} | graph.empty("cache")
        assert set(graph(**given)) == {"all"}
        with pytest.raises(
            InvalidInputError, match=r"offsets is torch.int64 on cuda:1, expected torch.int64 on cuda:0"
        ):
            graph(**{**given, "offsets": given["offsets"].to("cuda:1")})
