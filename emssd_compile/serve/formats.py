"""Grammars of `response_format`, each compiled once."""

from __future__ import annotations

import functools
import json
from typing import Any

from emssd_compile.grammar import Grammar, json_schema
from emssd_compile.serve.schemas import ResponseFormat

_MOST = 128  # grammars that are kept


class Formats:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._made = functools.lru_cache(_MOST)(self._make)

    def grammar(self, wanted: ResponseFormat) -> Grammar | None:
        """What an answer keeps to; None if it may be any text. Raises what `json_schema` does."""
        if wanted.type == "text":
            return None
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        return self._made(json.dumps(schema))

    def _make(self, schema: str) -> Grammar:
        return json_schema(schema, self._tokenizer)
