"""The server as an app of FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

import emssd_compile
from emssd_compile.decoder import Decoder
from emssd_compile.serve.answers import Answer, ChatForm, CompletionForm, Form
from emssd_compile.serve.errors import ApiError, add_handlers
from emssd_compile.serve.guarding import guarded
from emssd_compile.serve.limits import Limits
from emssd_compile.serve.schemas import ChatBody, CompletionBody
from emssd_compile.serve.service import Asked, Service
from emssd_compile.serve.streaming import Delivery


def create_app(
    decoder: Decoder,
    tokenizer: Any,
    *,
    name: str = "model",
    api_key: str | None = None,
    limits: Limits | None = None,
    warmup: Collection[str] = (),
) -> FastAPI:
    """An app that speaks OpenAI's API, to be run by uvicorn or mounted in an app of your own.

    It opens a session of the decoder, and closes it when the app is shut down. Mounted apps are not told of that: call
    `app.state.service.close()` then.

    Args:
        decoder: a compiled model.
        tokenizer: of transformers, the model's own.
        name: what clients call the model.
        api_key: clients show it as `Authorization: Bearer KEY`; None: nobody is asked.
        limits: of requests.
        warmup: fields of requests for which steps are compiled now rather than when one first sets them, such as
            "temperature" and "response_format"; `emssd_compile.serve.WARMED` has them all.

    Raises:
        OptionError: `warmup` names something else.
        SessionError: a session of the decoder is open.
    """
    limits = limits or Limits()
    service = Service(decoder, tokenizer, name=name, limits=limits, warmup=warmup)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="emssd_compile", version=emssd_compile.__version__, lifespan=lifespan)
    app.state.service = service
    app.include_router(_open_routes(service))
    app.include_router(_v1_routes(service, guarded(api_key, limits.max_body_size)))
    add_handlers(app)
    return app


def _v1_routes(service: Service, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=route_class)
    about = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "emssd_compile"}
    about["max_model_len"] = service.session.capacity

    async def answer(request: Request, asked: Asked, form: Form) -> Response:
        body = asked.body
        choices = await asyncio.to_thread(service.submit, asked)
        for choice in choices:
            service.metrics.follow(choice)
        includes_usage = body.stream_options is not None and body.stream_options.include_usage
        shown = Answer(form, service.name, has_logprobs=asked.logprobs is not None, includes_usage=includes_usage)
        delivery = Delivery(request, choices, shown, body.n)
        return delivery.events(includes_usage=includes_usage) if body.stream else await delivery.whole()

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(request, await asyncio.to_thread(service.completion, body), CompletionForm())

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(request, await asyncio.to_thread(service.chat, body), ChatForm())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return about

    return router


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        if service.session.closed:
            raise ApiError(503, "the session is closed", code="closed")
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
