"""`dump`: every stage of a compile as readable code."""

import emssd_compile
from emssd_compile.dumping import active_observers
from tests.passes.graphs import model_with_attention


def _compile():
    return emssd_compile.optimize(model_with_attention(), max_batch=2, max_length=32, backend="eager")


def test_each_pass_leaves_its_graph_before_and_after_and_a_line(tmp_path):
    with emssd_compile.dump(tmp_path / "new" / "folder") as folder:
        fast = _compile()
    no_passes = {"capture", "selfcheck"}
    names = [record.name for record in fast.explain().records if record.name not in no_passes]
    expected = {f"{i:02d}_{name}.{when}.py" for i, name in enumerate(names) for when in ("before", "after")}
    assert {path.name for path in folder.iterdir()} == expected | {"summary.txt"}
    lines = (folder / "summary.txt").read_text().splitlines()
    assert [line.split()[2].rstrip(":") for line in lines] == names
    assert all("changed" in line and "nodes" in line and "ms" in line for line in lines)


def test_the_files_show_what_a_pass_did(tmp_path):
    with emssd_compile.dump(tmp_path):
        _compile()
    (before,) = tmp_path.glob("*_raise_attention.before.py")
    (after,) = tmp_path.glob("*_raise_attention.after.py")
    assert "scaled_dot_product_attention" in before.read_text()
    assert "scaled_dot_product_attention" not in after.read_text()
    assert "torch.ops.emssd.attention" in after.read_text()


def test_nothing_is_written_once_it_is_closed(tmp_path):
    with emssd_compile.dump(tmp_path):
        pass
    _compile()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.txt"]
    assert active_observers() == ()
