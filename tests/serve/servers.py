"""What tests of the server share: a toy that chats, the server in a thread, and what `generate` gives."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

pytest.importorskip("fastapi", reason="the server is an app of it")
pytest.importorskip("transformers", reason="chat templates and tokenizers are its")

import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import emssd_compile
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.serve import create_app
from tests.zoo import toy_model

ROWS, LENGTH, NAME, WAIT = 4, 128, "toy", 120
TEMPLATE = """{% for m in messages %}
{%- if m['role'] == 'system' and not loop.first %}{{ raise_exception('a system message comes first') }}{% endif -%}
<{{ m['role'] }}>{{ m['content'] }}
{% endfor %}<assistant>"""
_TEXTS = ["def add(a, b): return a + b", "the cat sat on the mat", "é è ü ß 漢字 🙂 🙃", '{"name": "x", "age": 1}'] * 3


@functools.cache
def tokenizer() -> Any:
    """Of bytes and pairs of them: its tokens are often no whole characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def ids_of(text: str) -> list[int]:
    """Its tokens."""
    ids: list[int] = tokenizer()(text)["input_ids"]
    return ids


@functools.cache
def toy() -> Any:
    """A model of the tokenizer's vocabulary, which ends a text now and then."""
    model = toy_model("llama", vocab_size=len(tokenizer()), num_hidden_layers=1)
    model.generation_config.eos_token_id = tokenizer().eos_token_id
    return model


def optimized() -> OptimizedModel:
    """The toy, for a few rows."""
    return emssd_compile.optimize(
        toy(), "prompt-lookup", max_batch=ROWS, max_length=LENGTH, backend="eager", layout="packed"
    )


@functools.cache
def twin() -> OptimizedModel:
    """To ask while a server has another."""
    return optimized()


spare = functools.cache(optimized)
"""For one server after the other."""


def new_tokens(prompt: str | list[int], **options: Any) -> list[int]:
    """What `generate` gives behind the prompt alone."""
    ids = ids_of(prompt) if isinstance(prompt, str) else prompt
    options = {"top_k": 0, **options} if options.get("do_sample") else options
    return twin().generate([ids], **options)[0][len(ids) :]


def text_of(tokens: list[int]) -> str:
    """Their text, without the EOS."""
    text: str = tokenizer().decode(tokens, skip_special_tokens=True)
    return text


def reason_of(tokens: list[int]) -> str:
    """Why they end."""
    return "stop" if tokens[-1] == tokenizer().eos_token_id else "length"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of the app, which runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(WAIT)


@contextmanager
def spare_server(**options: Any) -> Iterator[str]:
    """A server with options of its own."""
    with served(create_app(spare(), tokenizer(), name=NAME, **options)) as address:
        yield address


def client(address: str, **options: Any) -> Any:
    """OpenAI's own."""
    return openai.OpenAI(
        **{"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "timeout": WAIT, **options}
    )
