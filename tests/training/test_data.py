import pytest
import torch

from emssd_compile.errors import InvalidInputError, OptionError
from emssd_compile.training.data import Order, Windows, check_disjoint, check_ids, encode, read_documents
from tests.training.toys import Characters


def test_files_are_texts_and_lines_of_jsonl_are(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "", "id": 1}\n{"text": "f\\u2028r"}\n')
    (tmp_path / "c.py").write_text("")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.py")]
    assert read_documents(files) == ["one\ntwo", "three", "f\u2028r"]


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.txt", b"", InvalidInputError, "no text in .*a.txt"),
        ("a.txt", b"fine\xff", InvalidInputError, "a.txt is no text: byte 4 is not UTF-8"),
        ("a.bin", b"ab\0c", InvalidInputError, "a.bin is no text: byte 2 is 0"),
        ("a.jsonl", b'{"text": "x"}\n{', InvalidInputError, "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"text": 3}', InvalidInputError, 'line 1: .* is no object with a string "text"'),
        ("a.txt", None, OptionError, "a.txt cannot be read: No such file"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, error, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said):
        read_documents([tmp_path / name])


def test_texts_are_one_stream_with_an_end_behind_each():
    tokens = encode(["ab", "c"], Characters(), None)
    assert tokens.tolist() == [97, 98, 2, 99, 2]
    assert encode(["ab", "c", "d"], Characters(), 4).tolist() == [97, 98, 2, 99]


def test_ids_that_the_model_lacks_are_refused():
    check_ids(torch.tensor([4, 9]), 10)
    with pytest.raises(InvalidInputError, match="the id 9, and the model has 9"):
        check_ids(torch.tensor([4, 9]), 9)


def test_windows_lie_side_by_side():
    windows = Windows.cut(torch.arange(11), 4)
    assert windows.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows.counts.all()
    with pytest.raises(InvalidInputError, match="a text of 3 tokens has no window of 4"):
        Windows.cut(torch.arange(3), 4)


def test_a_share_is_held_out_and_nothing_is_in_both():
    windows = Windows.cut(torch.arange(40), 4)
    learnt, held_out = windows.split(0.2, seed=1)
    assert (len(learnt), len(held_out)) == (8, 2)
    assert sorted([*learnt.tokens.flatten().tolist(), *held_out.tokens.flatten().tolist()]) == list(range(40))
    assert windows.split(0.2, seed=1)[1].digest() == held_out.digest()
    assert windows.split(0.2, seed=2)[1].digest() != held_out.digest()
    with pytest.raises(InvalidInputError, match="one window only"):
        windows[:1].split(0.2, seed=1)


def test_a_text_is_not_both_learnt_and_held_out():
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(InvalidInputError, match="'b'"):
        check_disjoint(["a", "b"], ["c", "b"])


def test_each_epoch_is_all_windows_in_an_order_of_its_own():
    order = Order(5, seed=3)
    taken = order.take(0, 10).tolist()
    first, second = taken[:5], taken[5:]
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second
    # where one begins does not matter
    assert Order(5, seed=3).take(4, 3).tolist() == taken[4:7]
    assert Order(5, seed=4).take(0, 10).tolist() != taken


def test_digests_tell_tokens_and_what_counts_apart():
    windows = Windows.cut(torch.arange(8), 4)
    others = [Windows(windows.tokens + 1, windows.counts), Windows(windows.tokens, ~windows.counts)]
    assert len({each.digest() for each in [windows, *others]}) == 3
