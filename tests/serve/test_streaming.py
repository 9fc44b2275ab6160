"""Answers in pieces, and clients that leave before the end."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
from torch import Tensor

from emssd_compile.serve.answers import Answer, CompletionForm
from emssd_compile.serve.choice import Choice
from emssd_compile.serve.streaming import Delivery
from emssd_compile.text import Detokenizer, StopTexts
from tests.serve.servers import (
    NAME,
    WAIT,
    client,
    ids_of,
    new_tokens,
    reason_of,
    spare,
    spare_server,
    text_of,
    tokenizer,
)

NEW = 40
NO_END = {"0": -100}


def test_the_pieces_of_a_completion_are_its_whole_text(openai_client):
    prompts = ["the cat", "é", "x = "]
    given = {"model": NAME, "prompt": prompts, "max_tokens": NEW, "seed": 8, "n": 2, "echo": True}
    whole = openai_client.completions.create(**given)
    texts, reasons, usages = [""] * 6, dict[int, str](), list[Any]()
    for chunk in openai_client.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing follows the reason"
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usages[-1] == whole.usage
    assert not any(usages[:-1])


def test_the_deltas_of_a_chat_are_its_message(openai_client):
    given = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": NEW, "seed": 2}
    given |= {"logprobs": True, "top_logprobs": 1, "logit_bias": NO_END}
    whole = openai_client.chat.completions.create(**given)
    chunks = [*openai_client.chat.completions.create(**given, stream=True)]
    assert all(chunk.usage is None for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content for choice in choices) == whole.choices[0].message.content
    assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) > 5, "they come one by one"
    told = [each.model_dump() for choice in choices for each in choice.logprobs.content]
    assert told == [each.model_dump() for each in whole.choices[0].logprobs.content]
    assert all("\ufffd" not in choice.delta.content or choice.delta.content[0] == "\ufffd" for choice in choices)


def test_no_part_of_a_stop_text_is_streamed(openai_client):
    whole = text_of(new_tokens("the cat", max_new_tokens=NEW))
    for size in (2, 5):
        for start in range(1, len(whole) - size):
            stop = whole[start : start + size]
            chunks = openai_client.completions.create(
                model=NAME, prompt="the cat", max_tokens=NEW, temperature=0, stop=stop, stream=True
            )
            text, limit = "", whole[: whole.index(stop)]
            for chunk in chunks:
                text += chunk.choices[0].text
                assert limit.startswith(text)
            assert text == limit
            assert chunk.choices[0].finish_reason == "stop"


def _until(holds: Any) -> None:
    ends = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(app, address, stream):
    session, body = app.state.service.session, {"model": NAME, "prompt": "the cat", "max_tokens": 110, "n": 20}
    body |= {"stream": stream, "logit_bias": NO_END, "seed": 1}
    before = _ended(address)

    async def leave() -> None:
        async with httpx.AsyncClient() as asked:
            reading = asyncio.create_task(_read(asked))
            while session.num_requests[1] == 0:
                assert not reading.done()
                await asyncio.sleep(0.001)
            reading.cancel()

    async def _read(asked: httpx.AsyncClient) -> None:
        async with asked.stream("POST", f"{address}/v1/completions", json=body, timeout=WAIT) as answer:
            async for _ in answer.aiter_bytes():
                pass

    asyncio.run(leave())
    _until(lambda: session.num_requests == (0, 0))
    _until(lambda: sum(_ended(address).values()) == sum(before.values()) + 20)
    after = _ended(address)
    assert after["abort"] - before.get("abort", 0) > 10, "most waited then"


def _ended(address: str) -> dict[str, float]:
    """How many texts ended, by their reasons."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("vllm:request_success_total{")]
    return {line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1]) for line in found}


class _Gone:
    """A request whose client has left."""

    async def receive(self) -> dict[str, str]:
        return {"type": "http.disconnect"}


def test_a_client_that_left_before_the_answer_began_frees_its_rows():
    """The server then never asks for a piece."""

    async def leave() -> Choice:
        with spare().session() as session:
            stream = session.submit(ids_of("the cat"), max_new_tokens=100, logit_bias={0: -100})
            choice = Choice(0, stream, 1, Detokenizer(tokenizer(), []), StopTexts([]), ())
            delivery = Delivery(_Gone(), [choice], Answer(CompletionForm(), NAME, has_logprobs=False), 1)  # type: ignore[arg-type]
            delivery.events(includes_usage=False)
            await asyncio.to_thread(stream.result, WAIT)
        return choice

    choice = asyncio.run(leave())
    assert (choice.finish_reason, choice.stream.finish_reason) == ("abort", "cancelled")
    assert len(choice.stream.tokens) < 100


def test_an_error_under_way_is_told_in_the_stream_and_ends_it_alone(monkeypatch):
    def fail(self: Any, ids: Tensor, *rest: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Detokenizer, "push", fail)
    with spare_server() as address, client(address) as asked:
        for stream in (True, False):
            with pytest.raises(openai.APIError, match="the server failed") as failed:
                [*asked.completions.create(model=NAME, prompt="x", max_tokens=3, temperature=0, stream=stream)]
            assert "secret" not in str(failed.value)
        monkeypatch.undo()
        answer = asked.completions.create(model=NAME, prompt="x", max_tokens=3, temperature=0)
        assert answer.choices[0].text == text_of(new_tokens("x", max_new_tokens=3))


def test_events_are_as_openai_sends_them(address):
    body = {"model": NAME, "prompt": "the cat", "max_tokens": 3, "stream": True, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=WAIT)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {each["object"] for each in found} == {"text_completion"}
    assert len({each["id"] for each in found}) == 1


def test_64_requests_at_a_time_get_what_generate_gives_each(address):
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.7, "seed": 3, "top_p": 0.8},
        {"temperature": 1, "seed": 9},
    ]
    prompts = ["the cat", "é", "x = ", "def add(a, b):", "🙂 the mat", "a", "sat on", '{"name']

    def is_chat(number: int) -> bool:
        return number % 5 in (1, 3)

    def said(choice: Any, kind: str) -> str:
        return (getattr(choice, kind).content or "") if hasattr(choice, kind) else choice.text

    async def ask(asked: openai.AsyncOpenAI, number: int) -> tuple[str, str, int]:
        prompt, place = prompts[number % 8], asked.chat.completions if is_chat(number) else asked.completions
        given: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if is_chat(number) else {}
        given = given or {"prompt": prompt}
        given |= {"model": NAME, "max_tokens": 5 + number // 2, **kinds[number // 8 % 4]}
        create: Any = place.create
        if number % 3:
            answer = await create(**given)
            (choice,) = answer.choices
            return said(choice, "message"), choice.finish_reason, answer.usage.completion_tokens
        text, stream = "", await create(**given, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            for choice in chunk.choices:
                text, reason = text + said(choice, "delta"), choice.finish_reason
        return text, reason, chunk.usage.completion_tokens

    async def ask_all() -> list[tuple[str, str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=WAIT) as asked:
            return await asyncio.gather(*(ask(asked, number) for number in range(64)))

    found = asyncio.run(ask_all())
    for number, answer in enumerate(found):
        kind = {**kinds[number // 8 % 4]}
        drawing = {"do_sample": True, "temperature": heat} if (heat := kind.pop("temperature")) else {}
        prompt = f"<user>{prompts[number % 8]}\n<assistant>" if is_chat(number) else prompts[number % 8]
        tokens = new_tokens(prompt, max_new_tokens=5 + number // 2, **kind, **drawing)
        assert answer == (text_of(tokens), reason_of(tokens), len(tokens))
    assert threading.active_count() < 64


@pytest.mark.parametrize("count", [96, pytest.param(4_000, marks=pytest.mark.long)])
def test_clients_that_leave_at_random_disturb_no_other(app, address, count):
    draw, prompts = random.Random(count), ["the cat", "é", "x = ", "def add(a, b):"]
    expected = {prompt: text_of(new_tokens(prompt, max_new_tokens=NEW)) for prompt in prompts}
    before, ends = sum(_ended(address).values()), Counter[str]()

    async def ask(asked: httpx.AsyncClient, patience: float) -> None:
        prompt, stream = draw.choice(prompts), draw.random() < 0.5
        body = {"model": NAME, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": stream}
        try:
            answer = await asyncio.wait_for(asked.post(f"{address}/v1/completions", json=body), patience)
        except TimeoutError:
            ends["left"] += 1
            return
        bodies = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        pieces = [json.loads(each)["choices"][0]["text"] for each in (bodies if stream else [answer.text])]
        assert "".join(pieces) == expected[prompt]
        ends["served"] += 1

    async def ask_all() -> None:
        async with httpx.AsyncClient(timeout=WAIT) as asked:
            for _ in range(0, count, 16):  # so many at a time
                patience = [draw.choice([WAIT, WAIT, 0.005, 0.3]) for _ in range(16)]
                await asyncio.gather(*(ask(asked, most if most == WAIT else draw.random() * most) for most in patience))

    asyncio.run(ask_all())
    assert min(ends["left"], ends["served"]) > count // 8
    _until(lambda: app.state.service.session.num_requests == (0, 0))
    after = sum(_ended(address).values()) - before
    assert ends["served"] <= after <= count, "who leaves before the server has read the request, asked for nothing"
