"""Speculative decoding compiled into one unpadded draft-and-verify step.

fast = emssd_compile.optimize(model)
out = fast.generate(inputs, max_new_tokens=128)
"""

import logging

from emssd_compile import drafters, errors, grammar, hf
from emssd_compile.dumping import dump
from emssd_compile.loading import LoadedModel, load
from emssd_compile.optimized_model import OptimizedModel, optimize
from emssd_compile.stats import Stats

__version__ = "0.1.0"

__all__ = ["LoadedModel", "OptimizedModel", "Stats", "drafters", "dump", "errors", "grammar", "hf", "load", "optimize"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who wants to read it adds a handler
