"""Errors as OpenAI's API shows them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from emssd_compile.errors import (
    CapacityError,
    EmssdError,
    GrammarError,
    InvalidInputError,
    OptionError,
    QueueFullError,
    SessionError,
)
from emssd_compile.serve.refusals import refusal

_log = logging.getLogger(__name__)
RETRY = {"Retry-After": "1"}  # seconds
_OF_REQUESTS = (CapacityError, GrammarError, InvalidInputError, OptionError)
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """What is answered instead of a text.

    Args:
        status: of HTTP.
        message: what was wrong, and what to do.
        param: the field that it is about.
        code: a word for programs.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """What is told of an error: its text if the request is the reason, and none of our internals otherwise."""
        if isinstance(error, cls):
            return error
        if isinstance(error, _OF_REQUESTS):
            return cls(400, str(error))
        if isinstance(error, QueueFullError):
            return cls(429, "as many requests wait as may; try again later", code="queue_full", headers=RETRY)
        if isinstance(error, SessionError):
            return cls(503, "the server is shutting down", code="closed")
        _log.error("a request failed", exc_info=error)
        return cls(500, "the server failed; its log says more")

    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def add_handlers(app: FastAPI) -> None:
    """Answer every error of the app in this form."""
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(NotImplementedError, _of_refused_option)
    for kind in (EmssdError, Exception):
        app.add_exception_handler(kind, _of_any)


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    shown = error if isinstance(error, ApiError) else ApiError(error.status_code, error.detail, headers=error.headers)
    return JSONResponse(shown.body(), shown.status_code, shown.headers)


async def _of_validation(request: Request, error: Exception) -> JSONResponse:
    """The fields that are wrong; `param` is the first of them."""
    assert isinstance(error, RequestValidationError)
    said: dict[str, list[str]] = {}
    for each in error.errors():
        _, *place = each["loc"]
        place = [] if each["type"] == "json_invalid" else place
        name, where = str(place[0]) if place else "", ".".join(map(str, place))
        text = refusal(name) if each["type"] == "extra_forbidden" and len(place) == 1 else each["msg"]
        said.setdefault(name, []).append(f"{where}: {text}" if where else text)
    message = "; ".join(text for texts in said.values() for text in dict.fromkeys(texts))
    return await _of_http(request, ApiError(400, message, param=next(iter(said)) or None))


async def _of_refused_option(request: Request, error: Exception) -> JSONResponse:
    return await _of_http(request, ApiError(400, str(error)))


async def _of_any(request: Request, error: Exception) -> JSONResponse:
    return await _of_http(request, ApiError.of(error))
