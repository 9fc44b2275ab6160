"""`MinNewTokens`: no EOS before its time, for each row by its own number, drafts counted."""

from dataclasses import replace

import torch

from emssd_compile.logits import MinNewTokens, Processed
from tests.logits.contexts import Line, context

EOS = [1, 3]


def test_an_eos_is_barred_while_a_row_has_too_few_new_tokens():
    rows = [Line([7, 8, 9], [4, 4], [0, 1]), Line([7, 8, 9], [4], [0]), Line([7], [], [])]
    seen = context(rows, 2, trees=False)
    seen = replace(
        seen,
        logits=torch.arange(6.0)[:, None] + torch.arange(5.0),
        prompt_lengths=torch.tensor([2, 2, 1]),
        is_eos=torch.tensor([token in EOS for token in range(5)]),
        options={"min_new_tokens": torch.tensor([3, 0, 1])},
    )
    processed = MinNewTokens()(seen)
    assert isinstance(processed, Processed)
    barred = [True, True, False, False, False, True]  # the first row predicts its 2nd, 3rd and 4th new token
    expected = seen.logits.clone()
    for entry, is_barred in enumerate(barred):
        if is_barred:
            expected[entry, EOS] = -torch.inf
    assert torch.equal(processed.logits, expected)


def test_in_a_tree_the_depth_of_a_node_counts_and_not_its_number():
    seen = context([Line([7], [4, 4, 4], [0, 0, 1])], 3, trees=True)
    options = {"min_new_tokens": torch.tensor([2])}
    seen = replace(seen, is_eos=torch.tensor([False, True, False, False, False]), options=options)
    barred = MinNewTokens()(seen).logits[:, 1].isinf()
    assert barred.tolist() == [True, True, True, False]
