"""The public surface: what `generate` takes and gives back, what it counts, and that the user's model stays theirs."""

import copy
import os
import pickle  # noqa: TID251  (nothing is loaded)
from typing import Any

import pytest
import torch

import emssd_compile
from emssd_compile.drafters import DraftModel, PromptLookup
from emssd_compile.errors import CapacityError, InvalidInputError, OptionError
from tests.exactness.compiled import K, target
from tests.exactness.models import Reference, build, prompt
from tests.zoo import toy_model

NEW = 10
LENGTHS = (5, 17, 2)
PROMPTS = [prompt(n) for n in LENGTHS]
PAD = 0


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


@pytest.fixture(scope="module")
def fast(model):
    return emssd_compile.optimize(model, PromptLookup(K), max_batch=2, max_length=64, backend="eager", prefill_chunk=16)


@pytest.fixture(scope="module")
def right():
    """A model whose every draft is right: what it emits in a step is known."""
    compiled = target("llama")
    return compiled.optimize(compiled.drafter("always-right"))


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(LENGTHS)
    pads = [[PAD] * (width - n) for n in LENGTHS]
    rows = [pad + ids if side == "left" else ids + pad for ids, pad in zip(PROMPTS, pads, strict=True)]
    masks = [
        [0] * len(pad) + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * len(pad)
        for ids, pad in zip(PROMPTS, pads, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_comes_back_as_given_with_the_new_tokens_behind(fast, reference, side):
    ids, mask = _padded(side)
    new = torch.tensor([reference(row, NEW) for row in PROMPTS])
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=PAD)
    assert torch.equal(out, torch.cat([ids, new], 1))


def test_rows_of_a_tensor_that_end_early_are_padded(fast, reference):
    ids, mask = _padded("left")
    eos = reference(PROMPTS[1], NEW)[3]
    new = [reference(row, NEW, [eos]) for row in PROMPTS]
    assert len({len(row) for row in new}) > 1
    width = max(map(len, new))
    expected = torch.tensor([row + [PAD] * (width - len(row)) for row in new])
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=PAD)
    assert torch.equal(out, torch.cat([ids, expected], 1))


def test_ragged_kinds_come_back_as_the_same_kind(fast, reference):
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected
    tensors = fast.generate([torch.tensor(ids) for ids in PROMPTS], max_new_tokens=NEW)
    assert [row.tolist() for row in tensors] == expected
    nested = torch.nested.nested_tensor([torch.tensor(ids) for ids in PROMPTS], layout=torch.jagged)
    out = fast.generate(nested, max_new_tokens=NEW)
    assert out.layout is torch.jagged
    assert [row.tolist() for row in out.unbind()] == expected


def test_keywords_of_hugging_face_are_understood(fast, reference):
    ids = torch.tensor([PROMPTS[0]])
    out = fast.generate(input_ids=ids, max_length=LENGTHS[0] + 3, return_dict_in_generate=True)
    assert out.sequences.tolist() == [[*PROMPTS[0], *reference(PROMPTS[0], 3)]]
    assert out[0] is out.sequences


class _Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token_in_order(right):
    streamer = _Streamer()
    out = right.generate([prompt(17)], max_new_tokens=NEW, streamer=streamer)
    assert streamer.tokens == out[0]
    assert streamer.ended


def test_a_stopping_criterion_ends_a_row_inside_an_accepted_draft(right):
    """It is asked after every token, also after those that came in one step; the other row goes on."""
    reference = target("llama").reference
    asked: list[int] = []

    def criterion(ids: torch.Tensor, scores: None) -> torch.Tensor:
        asked.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == 40 + 3, False])

    right.stats.reset()
    prompts = [prompt(17), prompt(40)]
    streamer_free = right.generate(prompts, max_new_tokens=NEW, stopping_criteria=[criterion])
    assert streamer_free == [[*prompt(17), *reference(prompt(17), 3)], [*prompt(40), *reference(prompt(40), NEW)]]
    assert asked == list(range(41, 40 + NEW + 1))
    assert right.stats.acceptance_histogram[K] > 0


def test_a_generation_that_the_user_breaks_off_leaves_nothing_behind(right):
    def broken(ids: torch.Tensor, scores: None) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        right.generate([prompt(17), prompt(40)], max_new_tokens=NEW, stopping_criteria=[broken])
    expected = [[*prompt(n), *target("llama").reference(prompt(n), NEW)] for n in (40, 17)]
    assert right.generate([prompt(40), prompt(17)], max_new_tokens=NEW) == expected


def test_the_counts_add_up(right):
    """Two rows, every draft right, 10 new tokens: 1 from the prompt, then 5 and 4 in two steps of 4 and 3 drafts."""
    right.stats.reset()
    right.generate([prompt(5), prompt(17)], max_new_tokens=NEW)
    stats = right.stats
    assert stats.num_emitted_tokens == 2 * NEW
    assert stats.num_steps == 3
    assert stats.num_row_steps == stats.num_spec_steps == 4
    assert stats.num_draft_tokens == stats.num_accepted_draft_tokens == 2 * (4 + 3)
    assert stats.acceptance_histogram == [0, 0, 0, 2, 2]
    assert stats.num_fed_tokens == 5 + 17 + 2 * (5 + 4)
    assert stats.num_padding_tokens == 0
    assert stats.draft_acceptance_rate == 1.0
    assert stats.mean_acceptance_length == 1 + 14 / 4


def test_the_counts_sum_over_calls_until_they_are_reset(fast):
    fast.stats.reset()
    for _ in range(2):
        fast.generate(PROMPTS, max_new_tokens=NEW)
    assert fast.stats.num_emitted_tokens == 2 * NEW * len(PROMPTS)
    assert sum(fast.stats.acceptance_histogram) == fast.stats.num_spec_steps
    weighted = sum(i * count for i, count in enumerate(fast.stats.acceptance_histogram))
    assert weighted == fast.stats.num_accepted_draft_tokens
    fast.stats.reset()
    assert fast.stats.num_emitted_tokens == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "last-logits"])
def test_weights_are_shared_and_the_model_is_left_as_it_was(architecture):
    """A change to the model is a change to the step."""
    model = build(architecture)
    ids = torch.tensor([PROMPTS[1]])
    names = set(model.state_dict())
    before = Reference(model)(PROMPTS[1], NEW)
    with torch.no_grad():
        logits = model(ids)[0]
    fast = emssd_compile.optimize(model, "none", max_batch=2, max_length=64, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(ids)[0], logits)
    assert set(model.state_dict()) == names

    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [p for p in fast.graph_module.parameters() if p.untyped_storage().data_ptr() not in storages]
    assert not held
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = Reference(model)(PROMPTS[1], NEW)
    assert after != before
    assert fast.generate([PROMPTS[1]], max_new_tokens=NEW) == [[*PROMPTS[1], *after]]


def test_one_model_can_be_optimized_twice(model, fast, reference):
    again = emssd_compile.optimize(model, "none", max_batch=3, max_length=40, backend="eager")
    expected = [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert again.generate(PROMPTS, max_new_tokens=NEW) == expected
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected


def test_a_causal_lm_as_drafter_is_a_draft_model(model, reference):
    """The model drafts for itself: all its drafts are right, which takes a KV cache of the drafts without a gap."""
    fast = emssd_compile.optimize(model, model, max_batch=2, max_length=64, backend="eager", layout="packed")
    assert isinstance(fast.drafter, DraftModel)
    assert fast.generate(PROMPTS, max_new_tokens=NEW) == [[*ids, *reference(ids, NEW)] for ids in PROMPTS]
    assert fast.stats.num_draft_tokens == fast.stats.num_accepted_draft_tokens > 0


def test_the_face_of_the_model_is_forwarded(model, fast):
    assert fast.config is model.config
    assert fast.generation_config is model.generation_config
    assert fast.device == torch.device("cpu")
    assert fast.dtype == torch.float32
    assert fast.can_generate()


def test_explain_shows_one_attention_and_one_cache_per_layer(model, fast):
    explanation = fast.explain()
    layers = model.config.num_hidden_layers
    assert explanation.record("raise_attention").changed == layers
    assert f"{layers} ragged_attention, {layers} append_kv, 0 padding ops" in str(explanation)


def test_caches_that_cannot_fit_into_memory_are_refused_before_they_are_allocated():
    model = build("llama")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = pages // (64 * 8) // 2  # their ids fit
    for memory, needs in (("slab", "the KV caches need"), ("auto", "the KV caches of one short request need|the rows")):
        with pytest.raises(CapacityError, match=rf"({needs}) .* [GM]iB .* smaller max_length or max_batch"):
            emssd_compile.optimize(model, "none", max_batch=rows, max_length=64, backend="eager", memory=memory)


def test_warming_up_compiles_and_counts_nothing(capfd):
    fast = emssd_compile.optimize(build("llama"), "none", max_batch=2, max_length=64, backend="eager")
    fast.warmup(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "compiling the step" in err
    assert fast.stats.num_steps == 0


def test_a_negative_number_of_positions_in_the_config_is_no_limit():
    model: Any = build("llama")
    model.config.max_position_embeddings = -1
    assert emssd_compile.optimize(model, "none", max_batch=1, max_length=16, backend="eager").options.max_length == 16
    with pytest.raises(OptionError, match="max_length is needed"):
        emssd_compile.optimize(model, "none", max_batch=1, backend="eager")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def test_a_row_longer_than_trained_decodes_where_rotary_scaling_reaches():
    model = toy_model("llama", max_position_embeddings=32, rope_parameters=YARN)
    reference = Reference(model)
    fast = emssd_compile.optimize(model, max_batch=2, max_length=128, backend="eager")
    prompts = [prompt(90), prompt(7)]
    assert fast.generate(prompts, max_new_tokens=NEW) == [[*ids, *reference(ids, NEW)] for ids in prompts]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_copies_are_refused_with_what_to_do(fast, copied):
    with pytest.raises(TypeError, match=r"export_onnx, export_aot or export_tensorrt, and emssd_compile\.load"):
        copied(fast)


def test_the_model_can_be_reached_through_it(model, fast, tmp_path):
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, model(input_ids=ids).logits)
    assert [*map(id, fast.parameters())] == [*map(id, model.parameters())]
    assert fast.name_or_path == model.name_or_path
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_call_is_the_models_forward_on_the_weights_as_they_are():
    model = build("llama")
    fast = emssd_compile.optimize(model, "none", max_batch=1, max_length=32, backend="eager")
    ids = torch.tensor([[0, 0, *prompt(5)], prompt(7)])
    given = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), "labels": ids}
    for _ in range(2):
        found, expected = fast(ids, **given), model(ids, **given)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
        found.loss.backward()
        with torch.no_grad():
            for parameter in fast.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad)
    assert not torch.equal(fast(ids, **given).loss, expected.loss)


def test_a_model_that_cannot_save_itself_says_so():
    plain = emssd_compile.optimize(build("own-positions"), "none", max_batch=1, max_length=16, backend="eager")
    assert plain.name_or_path == ""
    with pytest.raises(OptionError, match="OwnPositions has no save_pretrained"):
        plain.save_pretrained("nowhere")


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"backend": "none"}, {"layout": "none"}, {"acceptance": "none"}])
def test_options_are_checked_before_weights_are_read(model, wrong, monkeypatch):
    monkeypatch.setattr("emssd_compile.optimized_model.check_weights", lambda _: pytest.fail("weights were read"))
    given = {"max_batch": 1, "max_length": 16, "backend": "eager", **wrong}
    with pytest.raises(OptionError):
        emssd_compile.optimize(model, **given)


def test_weights_are_read_once(monkeypatch):
    read: list[object] = []
    monkeypatch.setattr("emssd_compile.optimized_model.check_weights", read.append)
    model, draft = build("own-positions"), build("last-logits")
    fast = emssd_compile.optimize(model, draft, max_batch=1, max_length=16, backend="eager")
    assert read == [model, fast.drafter]
    assert any(held is draft for held in fast.drafter.modules())


def test_a_model_that_is_offloaded_is_refused_by_that_name(monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    with pytest.raises(InvalidInputError, match="offloaded and brought in layer by layer"):
        emssd_compile.optimize(model, max_batch=1, max_length=16, backend="eager")
