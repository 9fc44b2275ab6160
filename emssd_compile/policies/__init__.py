"""Draft-length policies: which drafts are worth verifying. To add one: one file with a `LengthPolicy`."""

from emssd_compile.policies.all_drafts import AllDrafts
from emssd_compile.policies.throughput import Throughput
from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking

__all__ = ["AllDrafts", "LengthPolicy", "PolicyContext", "Ranking", "Throughput"]
