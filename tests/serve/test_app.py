"""The two endpoints, asked by OpenAI's client, say what `generate` gives."""

import json
import re
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

import emssd_compile
from emssd_compile.serve import create_app
from emssd_compile.step.paging import BLOCK_SIZE
from tests.serve.servers import (
    LENGTH,
    NAME,
    client,
    ids_of,
    new_tokens,
    optimized,
    reason_of,
    served,
    spare,
    text_of,
    tokenizer,
    toy,
    twin,
)

NEW = 24
GREEDY = {"temperature": 0}
MESSAGES = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
CHAT = "<system>be brief\n<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("fields", "extra", "options"),
    [
        (GREEDY, {}, {}),
        (GREEDY | {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}, {}),
        ({"seed": 5}, {}, {"do_sample": True, "top_k": 0, "seed": 5}),
        ({"seed": 5, "temperature": 0.7, "top_p": 0.8}, {}, {"temperature": 0.7, "top_p": 0.8, "top_k": 0}),
        ({"seed": 5}, {"top_k": 7, "min_p": 0.1}, {"top_k": 7, "min_p": 0.1}),
        ({"seed": 5}, {"top_k": -1}, {"top_k": 0}),
        (GREEDY | {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {}, None),
        (GREEDY, {"repetition_penalty": 1.7}, None),
        (GREEDY | {"logit_bias": {"70": 4.5, "71": -100}}, {}, {"logit_bias": {70: 4.5, 71: -100}}),
    ],
)
def test_each_option_means_what_it_means_to_generate(openai_client, fields, extra, options):
    if options is None:
        options = {name: value for name, value in (fields | extra).items() if name != "temperature"}
    if "seed" in fields:
        options = {"do_sample": True, "seed": fields["seed"], **options}
    tokens = new_tokens("the cat", max_new_tokens=NEW, **options)
    answer = openai_client.completions.create(model=NAME, prompt="the cat", max_tokens=NEW, extra_body=extra, **fields)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text_of(tokens), reason_of(tokens))
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(ids_of("the cat")),
        "completion_tokens": len(tokens),
        "total_tokens": len(ids_of("the cat")) + len(tokens),
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["the cat", "é", "x = "], ["the cat", "é", "x = "]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
    ],
)
def test_prompts_come_as_texts_or_tokens_one_or_several(openai_client, prompt, prompts):
    answer = openai_client.completions.create(model=NAME, prompt=prompt, max_tokens=NEW, **GREEDY)
    expected = [text_of(new_tokens(each, max_new_tokens=NEW)) for each in prompts]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [*range(len(prompts))]


def test_n_texts_of_each_prompt_are_those_of_generate_with_the_seed(openai_client):
    prompts = [ids_of("the cat"), ids_of("x = ")]
    rows = twin().generate(prompts, max_new_tokens=9, do_sample=True, top_k=0, seed=3, num_return_sequences=3)
    expected = [text_of(row[len(prompts[i // 3]) :]) for i, row in enumerate(rows)]
    answer = openai_client.completions.create(model=NAME, prompt=prompts, max_tokens=9, seed=3, n=3)
    assert [choice.text for choice in answer.choices] == expected
    assert len({*expected}) > 3, "they differ"
    assert answer.usage.prompt_tokens == sum(map(len, prompts)), "n texts have one prompt"


def test_without_max_tokens_a_completion_has_16_and_a_chat_what_fits(openai_client):
    bias = {"0": -100}  # no EOS
    completion = openai_client.completions.create(model=NAME, prompt="the cat", logit_bias=bias, **GREEDY)
    chat = openai_client.chat.completions.create(model=NAME, messages=MESSAGES, logit_bias=bias, **GREEDY)
    assert completion.usage.completion_tokens == 16
    assert chat.usage.total_tokens == LENGTH
    assert (completion.choices[0].finish_reason, chat.choices[0].finish_reason) == ("length", "length")


def test_a_chat_goes_through_the_template(openai_client):
    tokens = new_tokens(CHAT, max_new_tokens=NEW, do_sample=True, seed=2)
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = openai_client.chat.completions.create(model=NAME, messages=MESSAGES, seed=2, **{limit: NEW})
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.role) == (text_of(tokens), "assistant")
        assert (choice.finish_reason, answer.usage.completion_tokens) == (reason_of(tokens), len(tokens))
    said = choice.message.model_dump()  # with all its nulls, as programs append it
    again = openai_client.chat.completions.create(model=NAME, messages=[*MESSAGES, said, MESSAGES[1]], max_tokens=3)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_echo_shows_the_prompt_first(openai_client):
    answer = openai_client.completions.create(model=NAME, prompt=["the ", "é"], max_tokens=5, echo=True, n=2, seed=1)
    plain = openai_client.completions.create(model=NAME, prompt=["the ", "é"], max_tokens=5, n=2, seed=1)
    prompts = ["the ", "the ", "é", "é"]
    assert [c.text for c in answer.choices] == [p + c.text for p, c in zip(prompts, plain.choices, strict=True)]


@pytest.mark.parametrize(("next", "shown"), [("🙂", "x🙂"), ("a", "x\ufffda")])
def test_a_prompt_that_ends_within_a_character_is_echoed_once(openai_client, next, shown):
    begun, last = ids_of("x🙂")[:-1], ids_of(next)[-1]
    assert text_of(begun) == "x\ufffd"
    given = {"model": NAME, "prompt": begun, "max_tokens": 1, "logit_bias": {str(last): 100}, **GREEDY}
    assert openai_client.completions.create(**given).choices[0].text == next
    assert openai_client.completions.create(**given, echo=True).choices[0].text == shown
    chunks = openai_client.completions.create(**given, echo=True, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == shown


def test_a_text_ends_at_tokens_of_its_own(openai_client):
    whole = new_tokens("the cat", max_new_tokens=NEW, eos_token_id=[])
    place = next(n for n in range(4, NEW) if whole.index(whole[n]) == n)
    given = {"model": NAME, "prompt": "the cat", "max_tokens": NEW, **GREEDY}
    own = {"ignore_eos": True, "stop_token_ids": [whole[place], 1]}
    answer = openai_client.completions.create(**given, extra_body=own)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text_of(whole[:place]), "stop")
    assert answer.usage.completion_tokens == place + 1
    end = tokenizer().eos_token_id
    for ignores, reason in ((False, "stop"), (True, "length")):
        favoured = {"logit_bias": {str(end): 100}, "extra_body": {"ignore_eos": ignores}}
        assert openai_client.completions.create(**given, **favoured).choices[0].finish_reason == reason


def test_a_stop_text_ends_the_text_before_it(openai_client):
    tokens = new_tokens("the cat", max_new_tokens=NEW)
    whole = text_of(tokens)
    stop = whole[3:6]
    answer = openai_client.completions.create(
        model=NAME, prompt="the cat", max_tokens=NEW, stop=["never", stop], **GREEDY
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    read = next(count for count in range(len(tokens)) if stop in text_of(tokens[:count]))
    assert answer.usage.completion_tokens in (read, read + 1), "a last character may wait for a token"


def test_log_probabilities_are_those_of_generate(openai_client):
    out: Any = twin().generate(
        [ids_of("the cat")],
        max_new_tokens=NEW,
        logprobs=True,
        top_logprobs=3,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0][len(ids_of("the cat")) :]
    given = {"model": NAME, "max_tokens": NEW, **GREEDY}
    shown = openai_client.completions.create(prompt="the cat", logprobs=3, **given).choices[0].logprobs
    assert shown.token_logprobs == pytest.approx(out.logprobs[0].tolist())
    assert shown.tokens == [tokenizer().decode([token]) for token in tokens]
    for line, top in zip(shown.top_logprobs, out.top_logprobs[0].tolist(), strict=True):
        assert [*sorted(line.values())][-1] == pytest.approx(top[0])
    before = [text_of(tokens[:i]) for i in range(len(tokens))]
    known = [(offset, text) for offset, text in zip(shown.text_offset, before, strict=True) if text[-1:] != "\ufffd"]
    assert [offset for offset, _ in known] == [len(text) for _, text in known]


def test_log_probabilities_of_a_chat(openai_client):
    out: Any = twin().generate(
        [ids_of(CHAT)],
        max_new_tokens=NEW,
        logprobs=True,
        top_logprobs=2,
        return_dict_in_generate=True,
        do_sample=True,
        top_k=0,
        temperature=0.5,
        seed=4,
    )
    tokens = out.sequences[0][len(ids_of(CHAT)) :]
    answer = openai_client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=NEW, seed=4, temperature=0.5, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [each.logprob for each in content] == pytest.approx(out.logprobs[0].tolist())
    assert [each.token for each in content] == [tokenizer().decode([token]) for token in tokens]
    assert [one.logprob for each in content for one in each.top_logprobs] == pytest.approx(
        [value for line in out.top_logprobs[0].tolist() for value in line]
    )
    for each in content:
        assert each.bytes is None if "\ufffd" in each.token else bytes(each.bytes).decode() == each.token


@pytest.mark.parametrize("stream", [False, True])
def test_answers_keep_to_the_response_format(openai_client, stream):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    blanks = {str(token): -100 for token in range(len(tokenizer())) if not tokenizer().decode([token]).strip()}
    given = {"model": NAME, "messages": MESSAGES, "response_format": asked, "logit_bias": blanks, "seed": 1}
    if stream:
        chunks = openai_client.chat.completions.create(stream=True, **given)
        text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    else:
        text = openai_client.chat.completions.create(**given).choices[0].message.content
    found = json.loads(text)
    assert isinstance(found["ok"], bool)
    assert found["size"] in (1, 2)


def test_a_response_format_without_an_end_is_refused_by_the_fields_of_the_request(openai_client):
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.BadRequestError, match=r"response_format with ignore_eos.* pass stop_token_ids"):
        openai_client.chat.completions.create(model=NAME, messages=MESSAGES, **asked)


def test_any_json_object(openai_client):
    blanks = {str(token): -100 for token in range(len(tokenizer())) if not tokenizer().decode([token]).strip()}
    for seed in range(20):
        answer = openai_client.chat.completions.create(
            model=NAME, messages=MESSAGES, response_format={"type": "json_object"}, seed=seed, logit_bias=blanks
        )
        text = answer.choices[0].message.content
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
            return
    pytest.fail("no object was closed")


def test_models_and_health(openai_client, address):
    (model,) = openai_client.models.list()
    assert (model.id, model.max_model_len) == (NAME, LENGTH)
    assert openai_client.models.retrieve(NAME).id == NAME
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_an_app_of_ones_own_mounts_it():
    mine, theirs = FastAPI(), create_app(spare(), tokenizer(), name=NAME, warmup=["temperature", "response_format"])
    mine.mount("/llm", theirs)
    try:
        with served(mine) as address, client(f"{address}/llm") as asked:
            answer = asked.completions.create(model=NAME, prompt="the cat", max_tokens=5, **GREEDY)
            assert answer.choices[0].text == text_of(new_tokens("the cat", max_new_tokens=5))
    finally:
        theirs.state.service.close()


def test_requests_share_what_was_read_only_with_those_of_their_salt():
    cached = emssd_compile.optimize(
        toy(), "none", max_batch=2, max_length=LENGTH, backend="eager", layout="packed", prefix_cache=True
    )
    ids, found = [*range(2, 2 + BLOCK_SIZE + 9)], []
    with served(create_app(cached, tokenizer(), name=NAME)) as address, client(address) as asked:
        for salt in ("a", "a", "b", None, "a"):
            answer = asked.completions.create(
                model=NAME, prompt=ids, max_tokens=4, **GREEDY, extra_body={"cache_salt": salt}
            )
            found.append(answer.choices[0].text)
        for wrong in ("", 3):
            with pytest.raises(openai.BadRequestError, match="cache_salt"):
                asked.chat.completions.create(model=NAME, messages=MESSAGES, extra_body={"cache_salt": wrong})
        chat = asked.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=4, **GREEDY, extra_body={"cache_salt": "a"}
        )
        told = httpx.get(f"{address}/metrics").text
    assert found == [text_of(new_tokens(ids, max_new_tokens=4))] * 5
    assert chat.choices[0].message.content == text_of(new_tokens(CHAT, max_new_tokens=4))
    assert cached.stats.prefix_cache_hits == 2 * BLOCK_SIZE
    for name, count in (("queries", 5 * len(ids) + len(ids_of(CHAT))), ("hits", 2 * BLOCK_SIZE)):
        assert re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (.*)$", told, re.M) == [str(float(count))]


def test_an_artifact_answers_what_it_was_exported_with(tmp_path):
    pytest.importorskip("onnxruntime")
    optimized().export_onnx(tmp_path / "toy", row_options=["do_sample"], check=False)
    made = emssd_compile.load(tmp_path / "toy")
    with served(create_app(made, tokenizer(), name=NAME)) as address, client(address) as asked:
        for fields, options in ((GREEDY, {}), ({"seed": 5}, {"do_sample": True, "seed": 5})):
            answer = asked.completions.create(model=NAME, prompt="the cat", max_tokens=NEW, **fields)
            assert answer.choices[0].text == text_of(new_tokens("the cat", max_new_tokens=NEW, **options))
        with pytest.raises(openai.BadRequestError, match="none of the row_options that the artifact was exported with"):
            asked.completions.create(model=NAME, prompt="the cat", extra_body={"min_p": 0.5})
