"""What overflows stays where it is: neither a draft nor a request that turns to NaN reaches another token."""

from __future__ import annotations

import math

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import emssd_compile
from emssd_compile.decoder import Decoder
from tests.exactness.models import Reference
from tests.export.subjects import VOCABULARY, Small, prompt
from tests.passes.graphs import Scripted

BROKEN, NEW, ROWS = 5, 12, 3


def clean(length: int) -> list[int]:
    return [(token + 1) % VOCABULARY if token == BROKEN else token for token in prompt(length)]


# More requests than rows: each row is used again, by a shorter one.
PROMPTS = [clean(40), [*clean(50), BROKEN, 3], [BROKEN], clean(7), clean(2), clean(1), [1, BROKEN], clean(9)]


def breaking(model: nn.Module) -> nn.Module:
    """The model with a token that overflows; before it has one, it can be compared with what is compiled of it."""
    embed = model.get_submodule("embed")
    assert isinstance(embed, nn.Embedding)
    with torch.no_grad():
        embed.weight[BROKEN] = math.inf
    return model


def decoder(target: str, folder) -> Decoder:
    model = Small()
    backend = target if target == "inductor" else "eager"
    fast = emssd_compile.optimize(
        model, Scripted([BROKEN, 7]), max_batch=ROWS, max_length=128, backend=backend, layout="packed", prefill_chunk=24
    )
    fast.generate([[1]], max_new_tokens=1)
    breaking(model)
    if target == backend:
        return fast
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # to be quick
        getattr(fast, f"export_{target}")(folder, check=False)
    return emssd_compile.load(folder)


def caches(fast: Decoder) -> list[Tensor]:
    return [tensor for name, tensor in fast._engine.tensors.items() if "_cache_" in name]


@pytest.mark.parametrize("target", ["eager", "inductor", "onnx", pytest.param("aot", marks=pytest.mark.long)])
def test_nan_stays_with_the_tokens_that_see_it(target, tmp_path):
    """In caches full of NaN, with a draft that overflows in each step, beside and behind requests that do."""
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    fast = decoder(target, tmp_path / "artifact")
    for cache in caches(fast):
        cache.fill_(math.nan)
    reference = Reference(breaking(Small()))
    rows = fast.generate(PROMPTS, max_new_tokens=NEW)
    assert rows == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert fast.stats.num_draft_tokens > 0
