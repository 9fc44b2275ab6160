"""`bench.trees`: both kinds of steps verify as many drafts, and none is accepted."""

import json
import math
from typing import Any

from bench import trees
from bench.trees import Rubbish
from emssd_compile import OptimizedModel
from emssd_compile.drafters.tree_shape import TreeShape
from tests.export.subjects import Small
from tests.passes.graphs import returned, step_of


def test_chains_and_trees_are_of_as_many_drafts():
    shape = TreeShape((2, 2))
    for is_chain in (True, False):
        drafter = Rubbish(shape, is_chain=is_chain)
        assert drafter.num_draft_tokens == 6
        assert ("draft_parents" in returned(step_of(drafter))) is not is_chain


def test_the_command_times_steps_that_emit_one_token_a_row(tmp_path, monkeypatch, capsys):
    compiled: list[OptimizedModel] = []
    compile_with = trees.compile_with

    def noted(*given: Any) -> OptimizedModel:
        compiled.append(compile_with(*given))
        return compiled[-1]

    monkeypatch.setattr(trees, "load", lambda options: Small())
    monkeypatch.setattr(trees, "compile_with", noted)
    path = tmp_path / "trees.json"
    sizes = ["--tree", "2", "2", "--batches", "2", "--context", "20", "--steps", "3", "--repeats", "2"]
    trees.main([*sizes, "--backend", "eager", "--json", str(path)])
    (row,) = json.loads(path.read_text())["tables"][0]["rows"]
    assert (row["batch"], row["nodes"]) == (2, 7)
    # Differences of short runs, on a machine that does other things: they need not be above 0.
    times = [row[name] for name in ("plain_seconds", "chain_seconds", "tree_seconds", "tree_over_chain")]
    assert all(math.isfinite(value) and value for value in times)
    assert "tree / chain" in capsys.readouterr().out
    plain, *drafting = compiled
    assert plain.drafter.num_draft_tokens == 0
    assert [fast.drafter.max_depth for fast in drafting] == [None, 2]
