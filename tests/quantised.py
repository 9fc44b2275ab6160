"""Quantised models, made as quantisers make them: weights that wrap integers and scales, and layers that hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emssd_compile.passes.graph import aten


class Int8Weight(Tensor):
    """Integers of 8 bits with a scale for each row, as a parameter: a tensor subclass such as torchao's.

    Args:
        integers: int8 `[N, M]`.
        scale: float `[N, 1]`.
    """

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Int8Weight:
        made: Int8Weight = torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)
        return made

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """The nearest to a weight."""
        return cls(*nearest(weight))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Weight:
        return cls(**inner)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            result = torch.mm(x.flatten(0, -2), weight.integers.t().to(x.dtype)) * weight.scale.flatten()
            result = result.reshape(*x.shape[:-1], -1)
            return result if bias is None else result + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is aten.detach.default:
            return cls(args[0].integers.detach(), args[0].scale.detach())
        raise NotImplementedError(func)


class Int8Linear(nn.Module):
    """A layer that writes its weight out before it multiplies."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.integers: Tensor
        self.scale: Tensor
        for name, value in zip(("integers", "scale"), nearest(layer.weight), strict=True):
            self.register_buffer(name, value)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers.to(x.dtype) * self.scale, self.bias)


class Int4Linear(nn.Module):
    """A layer of integers of 4 bits, packed for torch's kernel for CPUs.

    Args:
        layer: its number of inputs is a multiple of 32.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        groups = layer.weight.detach().unflatten(1, (-1, 32))  # [N, M / 32, 32]
        scale = groups.abs().amax(2) / 7  # [N, M / 32]
        integers = (groups / scale[:, :, None]).round().to(torch.int32) + 8
        self.integers: Tensor
        self.register_buffer("integers", torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.flatten(1), 1))
        self.scales: Tensor
        self.register_buffer("scales", torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.integers, 32, self.scales)
        return result.reshape(*x.shape[:-1], -1)


def nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers `[N, M]` and scales `[N, 1]` nearest to a weight."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


def with_weights(model: nn.Module) -> None:
    """Wrap the weights of all linear layers."""
    for layer in _layers(model):
        layer.weight = nn.Parameter(Int8Weight.of(layer.weight), requires_grad=False)


def with_layers(model: nn.Module, kind: type[nn.Module] = Int8Linear) -> None:
    """Put layers of a kind in the place of all linear layers."""
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
