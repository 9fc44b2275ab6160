"""Draft-length policies: which drafts are worth verifying. To add one: one file with a `LengthPolicy`."""

from emssd_compile.policies.all_drafts import AllDrafts
from emssd_compile.policies.throughput import Throughput
from emssd_compile.step.parts import PartSizes
from emssd_compile.step.policy import LengthPolicy, PolicyContext, Ranking
from emssd_compile.step.tensor_spec import TensorSpec

__all__ = ["AllDrafts", "LengthPolicy", "PartSizes", "PolicyContext", "Ranking", "TensorSpec", "Throughput"]
