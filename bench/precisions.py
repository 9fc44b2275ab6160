"""The precisions that models are measured in."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from bench import shapes
from emssd_compile.errors import OptionError

PRECISIONS = ("float32", "bfloat16", "int8")


def build(name: str, precision: str, device: torch.device) -> PreTrainedModel:
    """A model of `shapes`, in a dtype or with weights of 8 bits as torchao makes them of float32.

    Raises:
        OptionError: what it takes is not installed.
    """
    if precision != "int8":
        return shapes.build(name, device, getattr(torch, precision))
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise OptionError("int8 needs torchao: pip install torchao") from error
    model = shapes.build(name, device)
    quantize_(model, Int8WeightOnlyConfig())
    return model
