"""Prompt lookup drafts for one row, kept on the host in an n-gram index.

Method: LLMA (arXiv 2304.04487): copy what followed the last occurrence of the text's own suffix.
"""

from collections.abc import Sequence


class PromptLookup:
    """Drafts from the most recent earlier occurrence of a row's suffix: longest n-gram first, `max_ngram` down to 1.

    For example the text `1 2 3 9 2 3` with `max_ngram=2` drafts `9 2 3`: its suffix `2 3` was last followed by `9`.
    The index is updated token by token, so that a draft costs `max_ngram` dictionary look-ups however long the text is.
    """

    def __init__(self, prompt: Sequence[int], *, max_ngram: int) -> None:
        self._max_ngram = max_ngram
        self._text: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends `tokens` to the text."""
        for token in tokens:
            # An n-gram enters the index together with the token that follows it, so the suffix never matches itself.
            for ngram in self._suffixes():
                self._followed_at[ngram] = len(self._text)
            self._text.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens; none without a match. A match near the end of the text has fewer to copy."""
        for ngram in self._suffixes():
            start = self._followed_at.get(ngram)
            if start is not None:
                return self._text[start : start + limit]
        return []

    def _suffixes(self) -> list[tuple[int, ...]]:
        """The n-grams that end the text, longest first."""
        longest = min(self._max_ngram, len(self._text))
        return [tuple(self._text[-size:]) for size in range(longest, 0, -1)]
