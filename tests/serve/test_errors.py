"""What is refused, and how: OpenAI's errors, by name, before anything is decoded."""

from typing import Any

import httpx
import openai
import pytest

from emssd_compile.errors import OptionError, QueueFullError, StaleModelError
from emssd_compile.serve import Limits, create_app
from emssd_compile.serve.errors import ApiError
from emssd_compile.serve.refusals import UNSUPPORTED
from emssd_compile.serve.schemas import CompletionBody
from emssd_compile.stream import Stream
from tests.serve.servers import LENGTH, NAME, WAIT, client, served, spare, spare_server, tokenizer
from tests.sessions import held

CHAT = [{"role": "user", "content": "hi"}]


def post(address: str, path: str, **body: Any) -> httpx.Response:
    content = {"prompt": "x"} if path == "completions" else {"messages": CHAT}
    given = {"model": NAME, "max_tokens": 1, **content, **body}
    return httpx.post(f"{address}/v1/{path}", json=given, timeout=WAIT)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_are_not_supported_are_refused_by_name(address, path, name):
    refused = post(address, path, **{name: "ask for it"})
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": f"{name}: this server does not support it; leave it out",
        "type": "invalid_request_error",
        "param": name,
        "code": None,
    }
    for nothing in (None, *UNSUPPORTED[name]):
        assert post(address, path, **{name: nothing}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("completions", {"max_token": 3}, "max_token", "no such field"),
        ("completions", {"messages": CHAT}, "messages", "no such field"),
        ("completions", {"prompt": 7}, "prompt", "valid string"),
        ("completions", {"prompt": []}, None, "0 prompts"),
        ("completions", {"prompt": ""}, None, "empty prompt"),
        ("completions", {"prompt": ["x", ""]}, None, "empty prompt"),
        ("completions", {"prompt": [10**6]}, None, "vocabulary"),
        ("completions", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("completions", {"max_tokens": True}, "max_tokens", "valid integer"),
        ("completions", {"max_tokens": "3"}, "max_tokens", "valid integer"),
        ("completions", {"max_tokens": LENGTH}, None, f"more than the {LENGTH} of this server"),
        ("completions", {"temperature": -1}, "temperature", "greater than or equal to 0"),
        ("completions", {"top_p": 1.5}, None, "top_p=1.5 is out of range"),
        ("completions", {"presence_penalty": 3}, None, "presence_penalty=3.0 is out of range"),
        ("completions", {"repetition_penalty": 0}, None, "repetition_penalty=0.0 is out of range"),
        ("completions", {"min_p": 2}, None, "min_p=2.0 is out of range"),
        ("completions", {"seed": 1 << 70}, None, "seed"),
        ("completions", {"n": 100}, None, "from 1 to 68 texts"),
        ("completions", {"stop": ""}, "stop", "at least 1 character"),
        ("completions", {"stop": ["a", ""]}, "stop", "at least 1 character"),
        ("completions", {"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ("completions", {"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ("completions", {"logit_bias": {"99999": 1}}, None, "logit_bias: 99999 is no id"),
        ("completions", {"logit_bias": {"1": 1e300}}, "logit_bias", "less than or equal to 100"),
        ("completions", {"logit_bias": {"\u0663": 1}}, "logit_bias", "pattern"),
        ("completions", {"prompt": [-1], "echo": True}, None, "-1"),
        ("completions", {"prompt": [1 << 40], "echo": True}, None, str(1 << 40)),
        ("completions", {"prompt": ["a"] * 5000}, None, "5000 prompts"),
        ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("completions", {"stop_token_ids": [1 << 40]}, None, "outside the vocabulary"),
        ("completions", {"stop_token_ids": [-1]}, "stop_token_ids", "greater than or equal to 0"),
        ("completions", {"echo": True, "logprobs": 1}, None, "echo: not together with logprobs"),
        ("completions", {"stream_options": {"include_usage": True}}, None, "only with stream=true"),
        ("completions", {"stream": True, "stream_options": {"usage": True}}, "stream_options", "Extra inputs"),
        ("completions", {"model": None}, "model", "Field required"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages", "0.name"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "Input should be 'text'",
        ),
        ("chat/completions", {"messages": [*CHAT, {"role": "system", "content": "x"}]}, None, "system message comes"),
        ("chat/completions", {"top_logprobs": 2}, None, "only with logprobs=true"),
        ("chat/completions", {"max_completion_tokens": 2}, None, "two names of one limit"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "blue"}}}},
            None,
            "JSON schema",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(address, path, body, param, said):
    refused = post(address, path, **body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert said in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b"7", b""])
def test_what_is_no_json_object_is_refused(address, content):
    headers = {"content-type": "application/json"}
    refused = httpx.post(f"{address}/v1/completions", content=content, headers=headers, timeout=WAIT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_another_model_and_another_place_are_not_found(openai_client, address):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this is 'toy'"):
        openai_client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        openai_client.models.retrieve("gpt")
    assert httpx.get(f"{address}/v1/images").json()["error"]["code"] is None
    assert httpx.get(f"{address}/v1/completions").status_code == 405


def test_a_key_is_asked_for_before_anything_else():
    with spare_server(api_key="sésame") as address:
        for header in ({}, {"authorization": "Bearer sesame"}, {"authorization": "sésame".encode()}):
            refused = httpx.post(f"{address}/v1/completions", content=b"{", headers=header)  # type: ignore[arg-type]
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        header = {"authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{address}/v1/models", headers=header).status_code == 200  # type: ignore[arg-type]
    with spare_server(api_key="secret") as address:
        with client(address, api_key="secret") as asked:
            assert [model.id for model in asked.models.list()] == [NAME]
        with client(address) as asked, pytest.raises(openai.AuthenticationError):
            asked.models.list()


def test_limits():
    limits = Limits(max_queue=0, max_body_size=2000, max_tokens=12, deadline=0.0)
    with spare_server(limits=limits) as address:
        large = post(address, "completions", prompt="x" * 2000)
        assert large.status_code == 413
        assert "larger than the 2000 bytes" in large.json()["error"]["message"]
        pieces = httpx.post(f"{address}/v1/completions", content=iter([b" " * 1000] * 3))
        assert pieces.status_code == 413, "without Content-Length, too"
        assert "max_tokens=13 is more than this server's 12" in post(address, "completions", max_tokens=13).text
        assert "from 1 to 4 texts" in post(address, "completions", n=5).text
        late = post(address, "completions")
        assert (late.status_code, late.json()["error"]["code"], late.headers["retry-after"]) == (503, "deadline", "1")
    with spare_server(limits=Limits(max_tokens=12)) as address, client(address) as asked:
        bias = {"0": -100}
        short = asked.completions.create(model=NAME, prompt="x", logit_bias=bias)
        chat = asked.chat.completions.create(model=NAME, messages=CHAT, logit_bias=bias)
        assert (short.usage.completion_tokens, chat.usage.completion_tokens) == (12, 12)


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_again(app, address, monkeypatch):
    session, begun = app.state.service.session, list[Stream]()
    most, submit = 64 + session.num_rows, session.submit

    def noted(*args: Any, **options: Any) -> Stream:
        begun.append(submit(*args, **options))
        return begun[-1]

    with held(session):
        for _ in range(most - 3):
            submit([5], max_new_tokens=1)
        monkeypatch.setattr(session, "submit", noted)
        refused = post(address, "completions", n=3)
        monkeypatch.undo()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        assert sum(session.num_requests) == most
    assert post(address, "completions").status_code == 200, "behind all that waited"
    assert session.num_requests == (0, 0)
    assert [stream.finish_reason for stream in begun] == ["cancelled"] * 2


def test_what_is_told_of_errors():
    told = {
        OptionError("n=0"): (400, "n=0"),
        NotImplementedError("of torch"): (500, "the server failed; its log says more"),
        QueueFullError("submit: 3 requests"): (429, "as many requests wait as may; try again later"),
        StaleModelError("a hook"): (500, "the server failed; its log says more"),
        RuntimeError("secret"): (500, "the server failed; its log says more"),
    }
    for error, (status, message) in told.items():
        shown = ApiError.of(error)
        assert (shown.status_code, shown.detail) == (status, message)


def test_an_option_that_is_known_and_not_supported_is_refused(address, app, monkeypatch):
    def submit(*args: object, **options: object) -> None:
        raise NotImplementedError("logprobs: this artifact does not honour it")

    monkeypatch.setattr(app.state.service.session, "submit", submit)
    refused = post(address, "completions", logprobs=1)
    assert (refused.status_code, refused.json()["error"]["message"][:8]) == (400, "logprobs")


def test_a_server_that_is_shut_down_says_so():
    app = create_app(spare(), tokenizer(), name=NAME)
    app.state.service.close()
    with served(app) as address:
        assert httpx.get(f"{address}/health").status_code == 503
        refused = post(address, "completions")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closed")


def test_a_field_to_be_warmed_up_is_one():
    with pytest.raises(OptionError, match="nothing is compiled for 'stop'; choose from temperature, top_p"):
        create_app(spare(), tokenizer(), warmup=["stop"])
    assert spare().generate([[5]], max_new_tokens=1), "no session was opened"


@pytest.mark.parametrize("prompt", ["\ud800", ["a", "b\udfff"]])
def test_half_of_a_surrogate_pair_is_no_prompt(prompt):
    """JSON can write it, and no tokenizer can read it."""
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        CompletionBody(model=NAME, prompt=prompt)
    assert CompletionBody(model=NAME, prompt="\U0001f600").prompt == "\U0001f600"
