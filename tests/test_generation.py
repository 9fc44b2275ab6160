import inspect
import math
import string
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CompileConfig,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextStreamer,
)

from emssd_compile.errors import CapacityError, InvalidInputError, OptionError
from emssd_compile.generation import GenerateOptions, own_options, resolve_options
from emssd_compile.runtime.inputs import parse_prompts
from emssd_compile.runtime.outputs import GenerateOutput, apply_stopping_criteria, limit_rows
from emssd_compile.step.options import DO_SAMPLE, RowOption

VOCAB = 64
CAPACITY = 40
PAD = 0
PROMPTS = torch.tensor([[5, 6, 7, 8], [PAD, PAD, 9, 10]])
MASK = (PROMPTS != PAD).long()


def resolve(generation_config: object = None, *, stored: object = None, **kwargs: object) -> GenerateOptions:
    if generation_config is stored is None and not kwargs.keys() & {"max_new_tokens", "max_length"}:
        kwargs["max_new_tokens"] = 4  # keeps the warning about the default length out of the other tests
    return resolve_options(generation_config, kwargs, stored=stored, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CAPACITY,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = string.ascii_letters + string.digits + ".,"
    backend = Tokenizer(BPE({character: index for index, character in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@torch.no_grad()
def generate(model, inputs, attention_mask=None, **kwargs):
    """Greedy decoding written to be obvious, one row and one token at a time, from nothing but the resolved options."""
    config = kwargs.pop("generation_config", None)
    options = resolve_options(config, kwargs, stored=model.generation_config, vocab_size=VOCAB)
    prompts = parse_prompts(
        inputs, attention_mask, vocab_size=VOCAB, capacity=CAPACITY, pad_token_id=options.prompt_pad_token_id
    )
    limits = limit_rows(options, prompts, CAPACITY)
    generated = []
    for row, tokens in enumerate(prompts.values.split(prompts.lengths)):
        ids = tokens.tolist()
        new: list[int] = []
        while len(new) < limits.max_new_tokens[row]:
            logits = model(torch.tensor([ids])).logits[0, -1]
            if len(new) < limits.min_new_tokens[row]:
                logits[list(options.eos_token_ids)] = -torch.inf
            new.append(int(logits.argmax()))
            ids.append(new[-1])
            is_late = options.max_time is not None and options.max_time == 0
            stops = any(apply_stopping_criteria(options.row_criteria, torch.tensor([ids])))
            if new[-1] in options.eos_token_ids or is_late or stops:
                break
        generated.append(new)
    return prompts.restore(generated, options.pad_token_id)


def token_at(model: LlamaForCausalLM, step: int) -> int:
    """The token that the first prompt emits at a step."""
    return int(model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=step + 1, pad_token_id=PAD)[0, -1])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 6},
        {"max_length": 9},
        {"max_new_tokens": 6, "eos_token_id": "third"},
        {"max_new_tokens": 6, "eos_token_id": ["third", 63], "pad_token_id": 1},
        {"max_new_tokens": 6, "eos_token_id": torch.tensor([63]), "pad_token_id": -1},
        {"max_new_tokens": 8, "eos_token_id": "third", "min_new_tokens": 5},
        {"max_new_tokens": 8, "eos_token_id": "third", "min_new_tokens": 2},
        {"max_new_tokens": 8, "eos_token_id": "third", "min_length": 9},
        {"max_length": 12, "eos_token_id": "third", "min_length": 6},
        {"generation_config": GenerationConfig(max_new_tokens=3, eos_token_id=63)},
        {"generation_config": GenerationConfig(max_length=30, temperature=0.5), "max_new_tokens": 3},
        {"max_new_tokens": 5, "max_time": 1000.0},
        {"max_new_tokens": 5, "max_time": 0.0},
    ],
)
@pytest.mark.parametrize("batch", [(PROMPTS, MASK), (PROMPTS[:1], None), (PROMPTS[1:], MASK[1:])])
def test_options_mean_what_they_mean_to_hugging_face(model, options, batch):
    options = {"pad_token_id": PAD, **options}
    match options.get("eos_token_id"):
        case "third":
            options["eos_token_id"] = token_at(model, 2)
        case ["third", *others]:
            options["eos_token_id"] = [token_at(model, 2), *others]
    expected = model.generate(batch[0], attention_mask=batch[1], **options)
    assert generate(model, *batch, **options).tolist() == expected.tolist()


def test_stop_strings_are_found_across_tokens(model, tokenizer):
    start, stop = PROMPTS.shape[1] + 1, PROMPTS.shape[1] + 3
    free = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, pad_token_id=PAD)
    # Without an EOS transformers does not pad the row that stopped, but shows what it would have gone on with.
    options = {"max_new_tokens": 6, "eos_token_id": 63, "pad_token_id": PAD}
    options |= {"stop_strings": tokenizer.decode(free[0, start:stop]), "tokenizer": tokenizer}
    expected = model.generate(PROMPTS, attention_mask=MASK, **options)
    assert expected[0, stop:].tolist() == [PAD] * 3
    assert generate(model, PROMPTS, MASK, **options).tolist() == expected.tolist()


def test_a_pad_id_marks_padding_where_no_mask_is_given(model):
    options = {"max_new_tokens": 5, "eos_token_id": token_at(model, 2), "pad_token_id": PAD}
    expected = model.generate(PROMPTS, **options)
    assert generate(model, PROMPTS, **options).tolist() == expected.tolist()
    assert expected.tolist() == model.generate(PROMPTS, attention_mask=MASK, **options).tolist()


def test_a_pad_id_that_is_an_eos_marks_nothing(model):
    options = {"max_new_tokens": 5, "eos_token_id": PAD, "pad_token_id": PAD}
    assert generate(model, PROMPTS, **options).tolist() == model.generate(PROMPTS, **options).tolist()
    assert resolve(eos_token_id=[3, PAD], pad_token_id=PAD).prompt_pad_token_id is None
    assert resolve(eos_token_id=3, pad_token_id=PAD).prompt_pad_token_id == PAD
    assert resolve(eos_token_id=3).prompt_pad_token_id is None


def test_max_new_tokens_wins_over_max_length_with_a_warning(model):
    expected = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=3, max_length=30, pad_token_id=PAD)
    with pytest.warns(UserWarning, match="max_length=30 gives way to max_new_tokens=3"):
        result = generate(model, PROMPTS, MASK, max_new_tokens=3, max_length=30)
    assert result.tolist() == expected.tolist()


def test_without_a_length_twenty_tokens_are_generated_with_a_warning(model):
    expected = model.generate(PROMPTS, attention_mask=MASK, pad_token_id=PAD)
    with pytest.warns(UserWarning, match="up to 20 tokens"):
        result = generate(model, PROMPTS, MASK)
    assert result.tolist() == expected.tolist()
    assert result.shape == (2, 24)


def test_the_default_length_ends_where_the_row_is_full(model):
    prompt = torch.arange(1, 31).unsqueeze(0)
    with pytest.warns(UserWarning, match="up to 20 tokens"):
        result = generate(model, prompt)
    assert result.tolist() == model.generate(prompt, pad_token_id=PAD).tolist()
    assert result.shape == (1, CAPACITY)


def test_max_length_counts_the_padding_of_a_tensor_but_the_own_tokens_of_a_list():
    options = resolve(max_length=9, min_length=6)
    tensor = parse_prompts(PROMPTS, MASK, vocab_size=VOCAB, capacity=CAPACITY)
    lists = parse_prompts([[5, 6, 7, 8], [9, 10]], vocab_size=VOCAB, capacity=CAPACITY)
    assert limit_rows(options, tensor, CAPACITY).max_new_tokens == [5, 5]
    assert limit_rows(options, tensor, CAPACITY).min_new_tokens == [2, 2]
    assert limit_rows(options, lists, CAPACITY).max_new_tokens == [5, 7]
    assert limit_rows(options, lists, CAPACITY).min_new_tokens == [2, 4]


def test_keyword_wins_over_config_wins_over_stored_and_none_turns_off():
    stored = SimpleNamespace(max_new_tokens=1, eos_token_id=[3, 4], pad_token_id=5)
    config = SimpleNamespace(max_new_tokens=2, eos_token_id=None)
    options = resolve(config, stored=stored, pad_token_id=6)
    assert (options.max_new_tokens, options.eos_token_ids, options.pad_token_id) == (2, (3, 4), 6)
    options = resolve(config, stored=stored, max_new_tokens=7, eos_token_id=None)
    assert (options.max_new_tokens, options.eos_token_ids, options.pad_token_id) == (7, (), 5)


def test_pad_falls_back_to_the_first_eos():
    assert resolve(eos_token_id=[7, 3]).pad_token_id == 7
    assert resolve(stored=SimpleNamespace(eos_token_id=VOCAB + 5, max_new_tokens=1)).pad_token_id == VOCAB + 5
    assert resolve().pad_token_id is None


def test_a_stored_eos_that_the_vocabulary_does_not_hold_never_matches_but_a_requested_one_is_an_error():
    stored = SimpleNamespace(eos_token_id=[VOCAB, 3], max_new_tokens=1)
    assert resolve(stored=stored).eos_token_ids == (3,)
    for wrong in (VOCAB, -1):
        with pytest.raises(OptionError, match="pass None for no EOS"):
            resolve(eos_token_id=wrong)


HONOURED = {
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "pad_token_id", "max_time"),
    *("stop_strings", "stopping_criteria", "streamer", "return_dict_in_generate", "num_return_sequences"),
    *("logits_processor", "prefix_allowed_tokens_fn"),
}
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
ARGUMENTS = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "generation_config", "kwargs"}


class Odd:
    """A value that no option takes, and that cannot be compared, like a tensor."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __repr__(self) -> str:
        return "odd"


HARMLESS: dict[str, object] = {
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "prefill_chunk_size": 16,
    "low_memory": True,
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "continuous_batching_config": Odd(),
    "bos_token_id": 1,
    "decoder_start_token_id": torch.tensor([1]),
    "trust_remote_code": True,
}


@pytest.mark.parametrize("name", sorted((FIELDS | ARGUMENTS) - HONOURED - HARMLESS.keys() - {"inputs"}))
def test_no_option_of_transformers_is_ignored(name):
    with pytest.raises(
        (NotImplementedError, OptionError), match=rf"^{name}=odd (is not supported|would have no effect): "
    ):
        resolve(**{name: Odd()})


@pytest.mark.parametrize("name", sorted(HONOURED - {"eos_token_id", "stop_strings"}))
def test_an_honoured_option_is_checked(name):
    with pytest.raises(OptionError, match=f"^{name}"):
        resolve(**{name: "rubbish"})


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_token_passes(name):
    assert resolve(**{name: HARMLESS[name]}) == resolve()
    assert resolve(**{name: None}) == resolve()


def test_what_changes_no_token_for_transformers_changes_none_here(model):
    names = ("use_cache", "cache_implementation", "disable_compile", "bos_token_id")
    options = {"max_new_tokens": 6, "pad_token_id": PAD, **{name: HARMLESS[name] for name in names}}
    options["use_cache"] = True  # transformers makes no static cache otherwise
    expected = model.generate(PROMPTS, attention_mask=MASK, **options)
    assert generate(model, PROMPTS, MASK, **options).tolist() == expected.tolist()


INTEGERS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "eos_token_id", "pad_token_id")
WRONG = {
    "bool": True,
    "numpy bool": np.True_,
    "bool tensor": torch.tensor(True),
    "float": 2.0,
    "NaN": math.nan,
    "infinite": math.inf,
    "float tensor": torch.tensor(2.0),
    "numpy float": np.float32(2),
    "text": "2",
    "huge": 10**30,
    "very huge": 10**5000,
    "very negative": -(10**5000),
    "meta": torch.tensor(2, device="meta"),
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_no_number_is_taken_for_another(name, value):
    with pytest.raises(OptionError, match=f"^{name}="):
        resolve(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7).int()])
def test_an_integer_of_another_kind_is_an_integer(name, value):
    assert resolve(**{name: value}) == resolve(**{name: 7})


@pytest.mark.parametrize(
    "value",
    [math.nan, -1, -0.5, -math.inf, True, np.True_, "3", 1j, [3], 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_a_time_limit_that_is_no_time_is_refused(value):
    with pytest.raises(OptionError, match=r"^max_time="):
        resolve(max_time=value)


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3), torch.tensor(3.0), torch.tensor(3)])
def test_a_time_limit_is_a_number_of_seconds(value):
    assert resolve(max_time=value).max_time == 3.0
    assert resolve(max_time=math.inf).max_time == math.inf


@pytest.mark.parametrize("value", [(1 << 63) - 1, 1 << 62])
def test_a_minimum_of_any_size_ends_at_the_maximum(value):
    for name in ("min_new_tokens", "min_length"):
        with pytest.warns(UserWarning, match="more than the maximum"):
            limits = limit_rows(resolve(**{name: value}, eos_token_id=3), prompts_of(3, 10), CAPACITY)
        assert limits.min_new_tokens == [4, 4]


def test_a_number_that_turns_an_option_off_may_be_of_any_kind_but_no_bool():
    assert resolve(num_beams=np.int64(1), do_sample=np.False_, temperature=torch.tensor(1.0)) == resolve()
    with pytest.raises(NotImplementedError, match="num_beams=True"):
        resolve(num_beams=True)
    with pytest.raises(NotImplementedError, match=r"num_beams=\(an integer of 16610 bits\)"):
        resolve(num_beams=10**5000)
    with pytest.raises(NotImplementedError, match="bad_words_ids="):
        resolve(bad_words_ids=[[10**5000]])
    with pytest.raises(NotImplementedError, match="repetition_penalty=nan"):
        resolve(repetition_penalty=math.nan)


def test_every_default_of_transformers_passes():
    defaults = GenerationConfig._get_default_generation_params()
    assisted = {name for name in defaults if "assist" in name or "lookbehind" in name}
    resolve(**{name: value for name, value in defaults.items() if name not in {"max_length", *assisted}})
    resolve(stored=GenerationConfig(**{**defaults, "max_length": 8}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "pass do_sample=False"),
        ({"num_beams": 4}, "use the model itself"),
        ({"encoder_repetition_penalty": 1.1}, "nothing in this step does that to the logits"),
        ({"guidance_scale": 1.5}, "use the model itself"),
        ({"watermarking_config": {}}, "logits"),
        ({"repetition_penalty": 1.1}, r"the artifact was exported without .*; export it with row_options="),
        ({"output_attentions": True}, "inner values"),
        ({"output_scores": True}, r"without what tells it; export it with row_options="),
        ({"prompt_lookup_num_tokens": 3}, r"optimize\(model, drafter=PromptLookup\("),
        ({"assistant_ensemble_weight": 0.5}, "changes what the model says"),
        ({"assistant_tokenizer": 3}, "the same tokenizer"),
        ({"forced_eos_token_id": 0}, "logits"),
        ({"past_key_values": torch.zeros(2)}, "KV cache"),
        ({"cache": torch.zeros(2)}, "KV cache"),
        ({"cache_implementation": "quantized"}, "as they are"),
        ({"stopping_criteria": [MaxLengthCriteria(9)]}, "pass max_length"),
        ({"stopping_criteria": [EosTokenCriteria(9)]}, "pass eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(options, message):
    with pytest.raises(NotImplementedError, match=rf"{next(iter(options))}.*{message}"):
        resolve(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 3}, "did you mean max_new_tokens"),
        ({"zzz": None}, "no option 'zzz'"),
        ({"temperature": 0.7}, "temperature=0.7 would have no effect"),
        ({"use_cache": "no"}, "use_cache='no' is not True or False"),
        ({"cache_implementation": "statc"}, "none of transformers'"),
        ({"compile_config": True}, "no configuration"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>' is not an integer"),
        ({"max_cache_len": 0}, "max_cache_len=0 is out of range"),
        ({"stop_strings": 3, "tokenizer": 3}, "no text"),
        ({"stop_strings": "x", "tokenizer": 3}, "cannot be found with 3"),
        ({"max_time": 3.0, "stopping_criteria": [MaxTimeCriteria(3.0)]}, "pass one"),
        ({"early_stopping": True}, "beam search"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": True}, "bool"),
        ({"max_new_tokens": 2.0}, "not an integer"),
        ({"min_length": -1}, "at least 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not an integer"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"stopping_criteria": MaxLengthCriteria(3)}, "wrap a single one in a list"),
        ({"stopping_criteria": [3]}, "wrap a single one in a list"),
        ({"streamer": print}, "put and end"),
        ({"generation_config": {"max_new_tokens": 3}}, "pass options by name"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(options, message):
    with pytest.raises(OptionError, match=message):
        resolve(**options)


def test_what_only_matters_to_sampling_passes_in_a_config():
    config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=3)
    assert resolve(config) == resolve(stored=config) == resolve(max_new_tokens=3)


def test_a_config_that_samples_says_how_to_be_greedy():
    stored = GenerationConfig(do_sample=True, temperature=0.6, max_new_tokens=3)
    with pytest.raises(
        NotImplementedError, match=r"do_sample=True, set in generation_config \(generate\(do_sample=False"
    ):
        resolve(stored=stored)
    assert resolve(stored=stored, do_sample=False).max_new_tokens == 3


def prompts_of(*lengths: int):
    return parse_prompts([[5] * length for length in lengths], vocab_size=VOCAB, capacity=CAPACITY)


def test_a_prompt_at_max_length_is_an_error_naming_the_row():
    with pytest.raises(OptionError, match=r"row 1: a prompt of 9 tokens.*max_length=9"):
        limit_rows(resolve(max_length=9), prompts_of(3, 9), CAPACITY)


def test_more_than_a_row_holds_is_an_error_saying_what_would_fit():
    assert limit_rows(resolve(max_new_tokens=30), prompts_of(3, 10), CAPACITY).max_new_tokens == [30, 30]
    with pytest.raises(CapacityError, match=r"row 1: 11 .*max_new_tokens=29 or less.*max_length=41"):
        limit_rows(resolve(max_new_tokens=30), prompts_of(3, 11), CAPACITY)


def test_a_minimum_above_the_maximum_warns_and_ends_at_the_maximum(model):
    options = {"max_new_tokens": 3, "min_new_tokens": 5, "eos_token_id": token_at(model, 1), "pad_token_id": PAD}
    with pytest.warns(UserWarning, match="more than the maximum"):
        result = generate(model, PROMPTS, MASK, **options)
    with pytest.warns(UserWarning, match="Unfeasible"):
        assert result.tolist() == model.generate(PROMPTS, attention_mask=MASK, **options).tolist()


def test_only_one_prompt_is_streamed(tokenizer):
    options = resolve(streamer=TextStreamer(tokenizer))
    assert limit_rows(options, prompts_of(3), CAPACITY).max_new_tokens == [4]
    with pytest.raises(InvalidInputError, match="streamer"):
        limit_rows(options, prompts_of(3, 4), CAPACITY)


def test_rows_of_a_tensor_that_may_end_apart_need_a_pad_id_before_any_work():
    tensor = parse_prompts(PROMPTS, MASK, vocab_size=VOCAB, capacity=CAPACITY)
    stop = [lambda ids, scores: False]
    with pytest.raises(OptionError, match="pad_token_id"):
        limit_rows(resolve(stopping_criteria=stop), tensor, CAPACITY)
    limit_rows(resolve(stopping_criteria=stop, pad_token_id=PAD), tensor, CAPACITY)
    limit_rows(resolve(stopping_criteria=stop), prompts_of(3, 4), CAPACITY)


def test_stopping_criteria_see_the_batch_and_all_of_them_are_asked():
    seen = []

    def criterion(answer):
        def ask(input_ids, scores):
            seen.append((input_ids.tolist(), scores))
            return answer

        return ask

    row, batch = torch.tensor([[1, 2]]), torch.tensor([[1, 2], [3, 4]])
    for yes in (True, torch.tensor([True]), torch.tensor([[True]]), torch.tensor(True), np.True_, np.array([True])):
        assert apply_stopping_criteria(StoppingCriteriaList([criterion(yes)]), row) == [True]
    for no in (False, torch.tensor([False])):
        assert apply_stopping_criteria([criterion(no)], row) == [False]
    assert apply_stopping_criteria([], batch) == [False, False]
    assert apply_stopping_criteria([criterion(True)], batch) == [True, True]
    assert apply_stopping_criteria([criterion(torch.tensor([False, True]))], batch) == [False, True]
    assert apply_stopping_criteria([criterion([True, False])], batch) == [True, False]
    seen.clear()
    assert apply_stopping_criteria([criterion(True), criterion(False)], batch) == [True, True]
    assert seen == [([[1, 2], [3, 4]], None)] * 2


@pytest.mark.parametrize(
    "answer",
    [
        *(None, 1, 0.0, "yes", torch.tensor(1), torch.tensor([True]), torch.tensor([[True], [False]])),
        *(torch.tensor([True] * 3), torch.tensor([1, 0]), [], [True, None], object()),
    ],
    ids=lambda answer: repr(answer).partition(" at ")[0],
)
def test_what_is_no_answer_of_a_stopping_criterion_is_an_error_that_names_it(answer):
    def undecided(input_ids, scores):
        return answer

    with pytest.raises(OptionError, match=r"undecided answered .*bool tensor of shape \[2\]"):
        apply_stopping_criteria([undecided], torch.tensor([[1, 2], [3, 4]]))


def test_a_stopping_criterion_cannot_write_into_what_the_next_one_sees():
    batch = torch.tensor([[1, 2]])
    assert apply_stopping_criteria([lambda ids, scores: bool(ids.zero_().any())] * 2, batch) == [False]
    assert batch.tolist() == [[1, 2]]


def test_the_output_reads_like_a_model_output():
    out = GenerateOutput(sequences=PROMPTS)
    assert out["sequences"] is out.sequences is out[0] is out.to_tuple()[0] is PROMPTS
    assert list(out) == ["sequences"]
    assert "sequences" in out
    assert "scores" not in out
    with pytest.raises(KeyError):
        out["scores"]


def test_transformers_is_only_needed_for_its_own_criteria(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert resolve(max_new_tokens=3).max_new_tokens == 3
    with pytest.raises(OptionError, match="stop_strings is carried out by transformers"):
        resolve(stop_strings="t1", tokenizer=tokenizer)
    code = "import sys, emssd_compile.runtime.outputs; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_warns_when_a_length_is_given(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [[5, 6]], max_new_tokens=1)


_SAMPLING = {
    "do_sample": DO_SAMPLE,
    "top_k": RowOption(0, least=0, needs="do_sample", implied=50),
    "temperature": RowOption(1.0, torch.float32, least=0.1, needs="do_sample"),
}


def _own(rows: int = 1, asked: tuple[str, ...] = (), **given: object) -> list[dict[str, object]]:
    return own_options(_SAMPLING, given, rows, VOCAB, asked)  # type: ignore[return-value]


def test_what_another_option_implies_gives_way_to_what_is_said():
    assert _own(do_sample=True) == [{"do_sample": True, "top_k": 50}]
    assert _own(do_sample=True, top_k=0) == [{"do_sample": True}], "said to be off"
    assert _own(3, do_sample=[True, False, True], top_k=[7, 7, None]) == [
        {"do_sample": True, "top_k": 7},
        {},
        {"do_sample": True, "top_k": 50},
    ]


def test_what_needs_another_option_is_passed_over_in_configs_and_refused_by_name():
    assert _own(temperature=0.0, top_k=7) == [{}], "as checkpoints say it that are to be decoded greedily"
    with pytest.raises(OptionError, match=r"temperature=0\.5 would have no effect without do_sample=True"):
        _own(temperature=0.5, asked=("temperature",))
    with pytest.raises(OptionError, match=r"temperature=0\.0 is out of range"):
        _own(temperature=0.0, asked=("temperature",))
    with pytest.raises(OptionError, match=r"temperature=0\.0 is out of range"):
        _own(temperature=0.0, do_sample=True)
    assert _own(temperature=1.0, top_k=50, asked=("temperature", "top_k")) == [{}], "as by default"
    assert _own(2, temperature=0.5, do_sample=[False, True], top_k=0, asked=("temperature",)) == [
        {},
        {"do_sample": True, "temperature": 0.5},
    ]
