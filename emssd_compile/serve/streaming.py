"""Sends answers: whole, or in server-sent events; and sees clients leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from emssd_compile.serve.answers import Answer
from emssd_compile.serve.choice import Choice, Piece
from emssd_compile.serve.errors import ApiError

_CLIENT_LEFT = 499  # as proxies log it; nobody reads it


class Delivery:
    """Sends what is decoded for a request. From the start, its texts are cancelled when its client leaves.

    Args:
        request: of the client; its body was read.
        choices: the texts.
        answer: makes their JSON.
        n: texts of each prompt.
    """

    def __init__(self, request: Request, choices: Sequence[Choice], answer: Answer, n: int) -> None:
        self._choices, self._answer, self._n = choices, answer, n
        self._watch = asyncio.create_task(self._abandon_when_left(request))

    async def whole(self) -> Response:
        """The answer when all texts have ended."""
        pieces: dict[int, list[Piece]] = {choice.index: [] for choice in self._choices}
        try:
            async for choice, piece in self._pieces():
                pieces[choice.index].append(piece)
        except ApiError:
            if self._has_left:
                return Response(status_code=_CLIENT_LEFT)
            raise
        finally:
            self._end()
        return JSONResponse(self._answer.whole([(each, pieces[each.index]) for each in self._choices], self._n))

    def events(self, *, includes_usage: bool) -> Response:
        """The answer piece by piece."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is nginx's
        return StreamingResponse(self._events(includes_usage), media_type="text/event-stream", headers=headers)

    async def _events(self, includes_usage: bool) -> AsyncIterator[bytes]:
        try:
            async for choice, piece in self._pieces():
                yield _event(self._answer.chunk(choice, piece))
            if includes_usage:
                yield _event(self._answer.last(self._choices, self._n))
        except ApiError as error:
            yield _event(error.body())
        finally:
            self._end()
        yield b"data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Those of all texts, as they come. The first error ends it."""
        arrived: asyncio.Queue[tuple[Choice, Piece | ApiError]] = asyncio.Queue()

        async def read(choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    arrived.put_nowait((choice, piece))
            except ApiError as error:
                arrived.put_nowait((choice, error))

        readers = [asyncio.create_task(read(choice)) for choice in self._choices]
        try:
            going = len(readers)
            while going:
                choice, piece = await arrived.get()
                if isinstance(piece, ApiError):
                    raise piece
                yield choice, piece
                going -= piece.finish_reason is not None
        finally:
            for reader in readers:
                reader.cancel()

    async def _abandon_when_left(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._abandon()

    @property
    def _has_left(self) -> bool:
        return self._watch.done() and not self._watch.cancelled()

    def _end(self) -> None:
        self._watch.cancel()
        self._abandon()

    def _abandon(self) -> None:
        for choice in self._choices:
            choice.abandon()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"
