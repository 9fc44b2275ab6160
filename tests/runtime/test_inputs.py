import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from emssd_compile.errors import CapacityError, InvalidInputError
from emssd_compile.runtime.inputs import PromptBatch, parse_prompts

VOCAB = 64
CAPACITY = 16
PAD = 0
ROWS = [[5, 6, 7], [8], [9, 10]]
LEFT = torch.tensor([[5, 6, 7], [PAD, PAD, 8], [PAD, 9, 10]])
RIGHT = torch.tensor([[5, 6, 7], [8, PAD, PAD], [9, 10, PAD]])
MIXED = torch.tensor([[5, 6, 7], [PAD, PAD, 8], [9, 10, PAD]])


def jagged(rows: list[list[int]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def parse(*args, **kwargs) -> PromptBatch:
    return parse_prompts(*args, vocab_size=VOCAB, capacity=CAPACITY, **kwargs)


def restore(prompts, generated, pad_token_id=None):
    return prompts.restore(generated, pad_token_id)


def unpacked(prompts: PromptBatch) -> list[list[int]]:
    return [row.tolist() for row in prompts.values.split(prompts.lengths)]


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("lists", (ROWS,)),
        ("lists", (tuple(tuple(row) for row in ROWS),)),
        ("tensors", ([torch.tensor(row) for row in ROWS],)),
        ("jagged", (jagged(ROWS),)),
        ("tensor", (LEFT, LEFT != PAD)),
        ("tensor", (RIGHT.int(), (RIGHT != PAD).long())),
        ("tensor", (MIXED, (MIXED != PAD).float())),
        ("tensor", ({"input_ids": LEFT, "attention_mask": (LEFT != PAD).long()},)),
        ("tensor", (BatchEncoding({"input_ids": RIGHT, "attention_mask": (RIGHT != PAD).long()}),)),
        ("lists", ({"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]},)),
        ("lists", (LEFT.tolist(), (LEFT != PAD).long().tolist())),
    ],
)
def test_every_kind_is_packed_without_padding(kind, args):
    prompts = parse(*args)
    assert prompts.kind == kind
    assert prompts.values.tolist() == [5, 6, 7, 8, 9, 10]
    assert prompts.values.dtype == torch.int64
    assert prompts.offsets == [0, 3, 4, 6]
    assert prompts.lengths == [3, 1, 2]


def test_a_tensor_without_mask_is_all_tokens_unless_a_pad_id_is_known():
    assert unpacked(parse(LEFT)) == LEFT.tolist()
    assert unpacked(parse(LEFT, pad_token_id=PAD)) == ROWS
    assert unpacked(parse(LEFT, torch.ones_like(LEFT), pad_token_id=PAD)) == LEFT.tolist()


@pytest.mark.parametrize("inputs", [[[PAD, 5, PAD, 6]], [torch.tensor([PAD, 5, PAD, 6])], jagged([[PAD, 5, PAD, 6]])])
def test_ragged_kinds_have_no_padding_so_a_pad_id_in_them_is_a_token(inputs):
    assert unpacked(parse(inputs, pad_token_id=PAD)) == [[PAD, 5, PAD, 6]]


def test_keywords_of_a_tokenizer_are_understood():
    encoding = BatchEncoding(
        {"input_ids": LEFT, "attention_mask": LEFT != PAD, "token_type_ids": torch.zeros_like(LEFT)}
    )
    assert unpacked(parse(**encoding)) == ROWS
    assert unpacked(parse(encoding)) == ROWS


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9), st.booleans()), min_size=1, max_size=5
    )
)
def test_padding_on_either_side_of_each_row_never_shows(rows_and_sides):
    width = max(len(row) for row, _ in rows_and_sides)
    padding = [[PAD] * (width - len(row)) for row, _ in rows_and_sides]
    padded = torch.tensor(
        [row + pad if right else pad + row for (row, right), pad in zip(rows_and_sides, padding, strict=True)]
    )
    prompts = parse(padded, padded != PAD)
    assert unpacked(prompts) == [row for row, _ in rows_and_sides]
    assert prompts.widths == [width] * len(rows_and_sides)


def test_lists_come_back_as_lists():
    assert restore(parse(ROWS), [[1], [2, 3], []]) == [[5, 6, 7, 1], [8, 2, 3], [9, 10]]


def test_tensors_come_back_as_tensors():
    restored = restore(parse([torch.tensor(row) for row in ROWS]), [[1], [2, 3], []])
    assert [row.tolist() for row in restored] == [[5, 6, 7, 1], [8, 2, 3], [9, 10]]
    assert all(row.dtype == torch.int64 for row in restored)


def test_a_jagged_tensor_comes_back_as_a_jagged_tensor():
    restored = restore(parse(jagged(ROWS)), [torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([4])])
    assert restored.layout == torch.jagged
    assert [row.tolist() for row in restored.unbind()] == [[5, 6, 7, 1], [8, 2, 3], [9, 10, 4]]


def test_a_tensor_keeps_its_padding_and_pads_rows_that_ended_early():
    restored = restore(parse(LEFT, LEFT != PAD), [[1], [2, 3], []], 63)
    assert restored.tolist() == [[5, 6, 7, 1, 63], [PAD, PAD, 8, 2, 3], [PAD, 9, 10, 63, 63]]


def test_a_tensor_needs_a_pad_id_only_where_rows_ended_early():
    prompts = parse(LEFT, LEFT != PAD)
    assert restore(prompts, [[1], [2], [3]]).tolist() == [[5, 6, 7, 1], [PAD, PAD, 8, 2], [PAD, 9, 10, 3]]
    with pytest.raises(InvalidInputError, match="pad_token_id"):
        restore(prompts, [[1], [2, 3], []])


@pytest.mark.parametrize(("padded", "dtype"), [(LEFT, torch.int64), (LEFT, torch.int32), (MIXED, torch.int64)])
def test_a_tensor_is_restored_as_hugging_face_returns_it(padded, dtype):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    mask = (padded != PAD).long()
    free = model.generate(padded.to(dtype), attention_mask=mask, max_new_tokens=8, eos_token_id=None, pad_token_id=PAD)
    eos = free[0, padded.shape[1] + 2].item()  # row 0 ends after at most three tokens
    expected = model.generate(
        padded.to(dtype), attention_mask=mask, max_new_tokens=8, eos_token_id=eos, pad_token_id=63
    )
    continuations = free[:, padded.shape[1] :].tolist()
    generated = [row[: row.index(eos) + 1] if eos in row else row for row in continuations]
    assert len(set(map(len, generated))) > 1
    restored = restore(parse(padded.to(dtype), mask), generated, 63)
    assert restored.dtype == expected.dtype
    assert restored.tolist() == expected.tolist()


STRIDED = torch.nested.nested_tensor([torch.tensor([5])], layout=torch.strided)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((None,), "no prompts"),
        (([],), "empty batch"),
        ((torch.zeros(0, 3, dtype=torch.long),), "empty batch"),
        (([[5], []],), "row 1 is an empty prompt"),
        ((torch.zeros(2, 0, dtype=torch.long),), "row 0 is an empty prompt"),
        ((LEFT, (LEFT != PAD) & (LEFT != 8)), "row 1 is an empty prompt: all of it is padding"),
        ((torch.tensor([[5, 6], [VOCAB, 7]]),), "row 1, index 0: token id 64 is outside the vocabulary of 64"),
        (([[5, 6], [7, -1]],), "row 1, index 1: token id -1"),
        ((torch.tensor([[PAD, 5, 99]]), torch.tensor([[0, 1, 1]])), "row 0, index 2: token id 99"),
        ((torch.tensor([[5.0]]),), "dtype torch.float32"),
        (([[5], [1.5]],), "row 1 of inputs has dtype torch.float32"),
        (([["a"]],), "row 0 of inputs is not a list of token ids"),
        ((["text"],), "row 0 of inputs is not a list of token ids"),
        (("text",), "inputs is a str"),
        ((torch.tensor(5),), "0-D tensor"),
        ((torch.tensor([5, 6]),), r"unsqueeze\(0\)"),
        ((torch.ones(1, 1, 1, dtype=torch.long),), "3-D tensor"),
        (([5, 6],), "wrap it in a list"),
        (([[[5]]],), "row 0 of inputs has 2 dimensions"),
        (([[5], torch.tensor([6])],), "mixes tensors, arrays and lists"),
        ((STRIDED,), "layout=torch.jagged"),
        ((LEFT, torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]])), "row 1 is not padded on one side only"),
        ((LEFT, torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]])), "row 1 is not padded on one side only"),
        ((LEFT, torch.full_like(LEFT, 2)), "row 0 of attention_mask has entries other than 0"),
        ((LEFT, torch.ones(2, 3)), "attention_mask has 2 rows, inputs has 3"),
        ((LEFT, torch.ones(3, 4)), "row 0 has 3 ids but 4 entries"),
        ((LEFT, torch.ones(3, 3, 3, 3)), "attention_mask is a 4-D tensor"),
        (({"input_ids": LEFT, "pixels": 1},), r"\['pixels'\]"),
        (({"input_ids": LEFT}, LEFT != PAD), "pass nothing beside it"),
    ],
)
def test_bad_prompts_are_refused_by_name(args, message):
    with pytest.raises(InvalidInputError, match=message):
        parse(*args)


def test_two_names_for_the_prompts_are_refused():
    with pytest.raises(InvalidInputError, match="two names"):
        parse(ROWS, input_ids=ROWS)


def test_ids_at_padding_are_not_looked_at():
    ids = torch.tensor([[-100, 5, 6]])
    assert unpacked(parse(ids, ids >= 0)) == [[5, 6]]


def test_a_pad_id_inside_the_text_is_not_guessed_to_be_padding():
    with pytest.raises(InvalidInputError, match=r"inferred from pad_token_id=0.*attention_mask=torch.ones_like"):
        parse(torch.tensor([[5, PAD, 6]]), pad_token_id=PAD)


def test_a_prompt_must_leave_room_for_one_token():
    assert parse([[5] * (CAPACITY - 1)]).lengths == [CAPACITY - 1]
    with pytest.raises(CapacityError, match=r"row 1: a prompt of 16 tokens.*max_length=17"):
        parse([[5], [5] * CAPACITY])


def test_token_types_other_than_zero_are_refused():
    with pytest.raises(NotImplementedError, match="token_type_ids"):
        parse(ROWS, token_type_ids=[[0, 0, 1], [0], [0, 0]])
