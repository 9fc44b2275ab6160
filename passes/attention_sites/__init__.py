"""Find attention in the forms that models write it in: one class a form."""

from __future__ import annotations

from typing import Any

from torch import fx

from emssd_compile.passes.attention_sites.form import AttentionSite, Form, Miss, Subject
from emssd_compile.passes.attention_sites.sdpa import ScaledDotProduct
from emssd_compile.passes.attention_sites.sinks import SinkColumn, SinkFactor
from emssd_compile.passes.attention_sites.softmax import SoftmaxOfProducts
from emssd_compile.passes.graph import refuse

FORMS: tuple[Form[Any], ...] = (
    ScaledDotProduct(),
    SinkColumn(),
    SinkFactor(),
    SoftmaxOfProducts(),  # last: an attention with sinks is one of these, too
)


def find_site(subject: Subject, node: fx.Node) -> AttentionSite | None:
    """The attention around `node`, if `node` is the heart of one: an SDPA, or a softmax over tokens.

    Args:
        subject: an L0 graph.
        node: where to look.

    Raises:
        UnsupportedModelError: it mixes tokens as an attention does, but is of no known form. The nearest miss is named.
    """
    misses: list[Miss] = []
    for form in FORMS:
        found = form.match(subject, node)
        if found is None:
            continue
        if isinstance(found, Miss):
            misses.append(found)
            continue
        objection = form.check(subject, found)
        if objection is None:
            return form.rewrite(subject, found)
        misses.append(objection)
        break  # all of the form is there, so it is meant: no other form is tried
    if misses:
        nearest = max(misses, key=lambda miss: miss.matched)
        raise refuse(nearest.node, nearest.reason)
    return None


__all__ = ["FORMS", "AttentionSite", "Subject", "find_site"]
