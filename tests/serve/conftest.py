"""One server for most tests."""

from collections.abc import Iterator

import openai
import pytest
from fastapi import FastAPI

from emssd_compile.serve import WARMED, create_app
from tests.serve.servers import NAME, client, optimized, served, tokenizer


@pytest.fixture(scope="session")
def app() -> FastAPI:
    fields = [field for field in WARMED if field != "response_format"]  # one form of the step for most tests
    return create_app(optimized(), tokenizer(), name=NAME, warmup=fields)


@pytest.fixture(scope="session")
def address(app) -> Iterator[str]:
    with served(app) as found:
        yield found


@pytest.fixture
def openai_client(address) -> Iterator[openai.OpenAI]:
    with client(address) as made:
        yield made
