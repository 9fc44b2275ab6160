"""What a server takes on, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass

from emssd_compile.numeric import integer, seconds

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of how many there may be.

    Attributes:
        max_queue: texts that wait for a row; more are refused with 429.
        max_body_size: bytes of a request.
        max_tokens: new tokens of a text; None: as many as fit a row.
        deadline: seconds after which a text ends with what it has; None: no limit.
    """

    max_queue: int = 64
    max_body_size: int = 4 * MEBIBYTE
    max_tokens: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        integer("max_queue", self.max_queue, least=0)
        integer("max_body_size", self.max_body_size, least=1)
        if self.max_tokens is not None:
            integer("max_tokens", self.max_tokens, least=1)
        if self.deadline is not None:
            seconds("deadline", self.deadline)
