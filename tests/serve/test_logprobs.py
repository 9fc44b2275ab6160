"""What is told of tokens is JSON, whatever the model computes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emssd_compile.serve.logprobs import LogprobReader, as_chat, as_completion
from tests.serve.servers import ids_of, tokenizer


class _Stream:
    """Of one token."""

    def __init__(self, value: float) -> None:
        self.value = value

    def told(self, name: str) -> Iterator[Tensor]:
        yield {
            "logprobs": torch.tensor(self.value),
            "top_logprobs": torch.tensor([self.value, -1.0]),
            "top_logprob_ids": torch.tensor(ids_of("ab")),
        }[name]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-2.5, -2.5), (-1e5, -9999.0), (float("-inf"), -9999.0), (float("nan"), -9999.0), (float("inf"), -9999.0)],
)
def test_a_log_probability_that_json_has_not_is_the_least(value, shown):
    stream: Any = _Stream(value)
    told = [LogprobReader(stream, 2, tokenizer()).read(ids_of("a")[0], 0)]
    completion = json.loads(json.dumps(as_completion(told), allow_nan=False))
    assert completion["token_logprobs"] == [shown]
    assert completion["top_logprobs"] == [{"a": shown, "b": -1.0}]
    (content,) = json.loads(json.dumps(as_chat(told), allow_nan=False))["content"]
    assert [content["logprob"], *(each["logprob"] for each in content["top_logprobs"])] == [shown, shown, -1.0]
