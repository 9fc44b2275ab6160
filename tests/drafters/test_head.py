import pytest
import torch

from emssd_compile.drafters import HEADS
from emssd_compile.errors import CheckpointError, OptionError
from tests.drafters.contexts import target_of
from tests.training.tiny_head import TinyHead, TinySizes


def test_a_fresh_head_is_of_the_target_s_sizes():
    target = target_of(None, 1, 8, 30)
    head = TinyHead.for_target(target, width=3)
    assert head.config == TinySizes(target.hidden_size, 30, 3, depth=2)
    assert head.down[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 3, "layers": 2}, r"a TinyHead has no size 'layers'; choose from width, depth"),
        ({"width": 3, "hidden_size": 2}, r"no size 'hidden_size'"),
        ({"depth": 1}, r"needs the size width"),
        ({"width": 0}, r"width=0 is out of range"),
    ],
)
def test_sizes_that_make_no_head_are_refused_by_name(sizes, said):
    with pytest.raises(OptionError, match=said):
        TinyHead.for_target(target_of(None, 1, 8, 30), **sizes)


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.kind)
def test_every_kind_is_made_for_a_target_without_more_sizes(kind):
    made = kind.for_target(target_of(None, 1, 8, 30, hidden_size=16))
    assert isinstance(made, kind)
    assert (made.config.hidden_size, made.config.vocabulary) == (16, 30)


def test_kinds_have_names_of_their_own():
    assert len({kind.kind for kind in HEADS}) == len(HEADS)


def test_weights_are_not_written_beside_others(tmp_path):
    head = TinyHead.for_target(target_of(None, 1, 8, 30), width=3)
    head.save_pretrained(tmp_path)
    head.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"other weights, as model.safetensors.index.json; choose another folder"):
        head.save_pretrained(tmp_path)
