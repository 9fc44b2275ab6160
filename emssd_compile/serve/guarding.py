"""What is checked of a request before it is read: its key, and its size while it comes in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message

from emssd_compile.serve.errors import ApiError


def guarded(api_key: str | None, max_body_size: int) -> type[APIRoute]:
    """A kind of routes that let a request through only if it shows the key, and only so many bytes of it."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                if api_key is not None:
                    _check_key(request, api_key)
                return await handle(_Sized(request, max_body_size))

            return checked

    return Guarded


def _check_key(request: Request, api_key: str) -> None:
    shown = request.headers.get("authorization", "").encode("latin-1")  # as it was read
    if not secrets.compare_digest(shown, f"Bearer {api_key}".encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class _Sized(Request):
    """A request that is refused when it turns out to be too large."""

    def __init__(self, request: Request, most: int) -> None:
        super().__init__(request.scope, self._receive_some)
        self._given, self._left, self._most = request.receive, most, most

    async def _receive_some(self) -> Message:
        message = await self._given()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise ApiError(413, f"the request is larger than the {self._most} bytes that this server reads")
        return message
