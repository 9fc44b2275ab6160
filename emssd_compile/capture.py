"""Capture: a causal language model in, its plain forward as one ATen graph (level L0) out.

The forward over a single sequence *without* a KV cache is captured, because it is the easiest thing to export and the
same for every model: in that graph only attention mixes tokens, and the KV cache is introduced later by a pass.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx._lazy_graph_module import _LazyGraphModule

from emssd_compile.branches import DecideBranches
from emssd_compile.errors import InvalidInputError, UnsupportedModelError
from emssd_compile.functional import functional

EXAMPLE_TOKENS = 11
"""Length of the example sequence: not 0 or 1 (which export specialises) and unlikely to equal another dimension."""
_LONGEST_REASON = 300
"""Characters of an export's own error that are worth reading."""


class _ForwardFailed(Exception):
    """The forward raised while it was captured; the cause says what."""


class PlainForward(nn.Module):
    """`ids[1, T] -> logits`, whatever the model's own signature and return type are.

    Args:
        model: the model.
        branches: while it is captured, what decides its branches.
    """

    def __init__(self, model: nn.Module, branches: DecideBranches | None = None) -> None:
        super().__init__()
        self.model, self.branches = model, branches
        self.options = {"use_cache": False} if _takes_use_cache(model) else {}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the ids."""
        if self.branches is None:
            return self._logits(input_ids)
        try:
            with self.branches:
                return self._logits(input_ids)
        except UnsupportedModelError:
            raise
        except Exception as error:  # export prints its whole graph for some of the model's own errors
            raise _ForwardFailed from error

    def _logits(self, input_ids: Tensor) -> Tensor:
        return _logits_of(self.model(input_ids, **self.options), type(self.model).__name__)


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether the forward has a `use_cache`, by name or, as its config tells, among its keywords."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return True
    keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return keywords and hasattr(getattr(model, "config", None), "use_cache")


def _logits_of(output: Any, model_name: str) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise UnsupportedModelError(
            f"{model_name}.forward returned {type(output).__name__}, which holds no logits; return a float tensor, "
            "a tuple whose first item is one, or an object with `.logits`"
        )
    return logits


def check_model(model: nn.Module) -> None:
    """Raise before any work if `model` cannot be what is asked for: not a module, in training mode, not loaded.

    No weight is read: `check_weights` does that.

    Raises:
        InvalidInputError: it is not a module, is in training mode, or its weights are not in memory.
        UnsupportedModelError: it is not decoder-only, or lies on several devices.
    """
    if isinstance(model, type):
        raise InvalidInputError(f"model is the class {model.__name__}; pass an instance of it")
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if model.training:
        raise InvalidInputError("the model is in training mode (dropout would be on); call model.eval() first")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only causal models are supported"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InvalidInputError(
                f"weight {name} is on the meta device: it was never loaded, or is offloaded and brought in layer by "
                "layer (cpu_offload, disk_offload, a device_map); a compiled step reads all weights where they lie. "
                "Load the model without offloading, or undo it (accelerate.hooks.remove_hook_from_submodules)"
            )
        if parameter.is_inference():
            raise InvalidInputError(
                f"weight {name} was made under torch.inference_mode(), and torch cannot capture a forward that "
                "reads it; make or load the model outside of inference_mode (generate may run inside)"
            )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"the weights lie on several devices {sorted(map(str, devices))}; move them to one")


def check_weights(model: nn.Module) -> None:
    """Raise InvalidInputError if a weight holds NaN or infinite values, or none. Reads each weight once."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InvalidInputError(
                f"weight {name} of the {type(model).__name__} is on the meta device: it was never loaded"
            )
        if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
            continue  # a quantised weight knows its own values; the comparison with the model reads them
        # A sum is NaN or infinite if any element is, and costs one pass over the weight.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float64)):
            raise InvalidInputError(
                f"weight {name} of the {type(model).__name__} holds NaN or infinite values; reload the checkpoint"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def capture(model: nn.Module, longest: int = EXAMPLE_TOKENS) -> fx.GraphModule:
    """Capture `model` as a level-L0 graph `forward(input_ids[1, T], positions[1, T]) -> logits`.

    The graph holds ATen ops only; `T` is symbolic; weights are attributes that *are* the model's own parameters.
    `positions` is an input that nothing reads yet (`lift_positions` connects it).

    Args:
        model: in eval mode.
        longest: most tokens of a row: a branch on the number of tokens must go one way up to there.

    Raises:
        InvalidInputError: the model is in training mode or its weights are unusable.
        UnsupportedModelError: the forward cannot be captured for a symbolic number of tokens.
    """
    check_model(model)
    graph_module = _bind_weights(_export_one_way(model, longest))
    _add_positions(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _export_one_way(model: nn.Module, longest: int) -> ExportedProgram:
    """The forward as it is for every number of tokens up to `longest`."""
    branches = DecideBranches(longest, longest)
    program = _export(model, branches)
    if not branches.changing:
        return program
    short = str(_export(model, DecideBranches(1, longest)).graph)
    if str(program.graph) == short:  # the branches change nothing
        return program
    limits = sorted({branch.limit for branch in branches.changing})
    limit = next((n for n in reversed(limits) if str(_export(model, DecideBranches(n, n)).graph) == short), limits[0])
    node = next((branch.node for branch in branches.changing if branch.limit == limit), branches.changing[0].node)
    raise UnsupportedModelError(
        f"max_length={longest}, but the forward of {type(model).__name__} computes something else for more than "
        f"{limit} tokens than for fewer (it branches on %{node.name}): tokens of a short row and of a long one cannot "
        "share a step",
        remedy=f"pass max_length={limit} or less",
        longest=limit,
    )


def _export(model: nn.Module, branches: DecideBranches) -> ExportedProgram:
    device = device_of(model)
    example = torch.arange(EXAMPLE_TOKENS, device=device)[None] % _vocabulary_hint(model)
    try:
        with torch.no_grad(), _quiet(), without_fake_cache():
            forward = PlainForward(model, branches)
            program = functional(
                torch.export.export(forward, (example,), dynamic_shapes=({1: Dim.AUTO},), strict=False)
            )
    except UnsupportedModelError:
        raise
    except Exception as error:  # export raises many types; the user needs one that says what to do
        cause = error.__cause__ if isinstance(error, _ForwardFailed) and error.__cause__ else error
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be captured: {_reason(cause)}. "
            "The forward must map ids[1, T] to logits without control flow on tensor values"
        ) from cause
    ids = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "input_ids")
    tokens = ids.meta["val"].shape[1]
    if isinstance(tokens, int) or not tokens.node.expr.free_symbols:  # a symbol that export fixed stays a SymInt
        raise UnsupportedModelError(
            f"{type(model).__name__} fixes the number of tokens (torch.export specialised it to "
            f"{tokens}); its forward must work for any length"
        )
    return program


def _reason(error: BaseException) -> str:
    """What export says, in a line without the graph that it may append, and the line of the forward."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:_LONGEST_REASON]
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        text = "a branch or a size depends on the value of a tensor"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ("/torch/", "/emssd_compile/"))]
    where = f", at {own[-1].filename}:{own[-1].lineno} `{own[-1].line}`" if own else ""
    return f"torch.export failed with {type(error).__name__}{f': {text}' if text else ''}{where}"


def _vocabulary_hint(model: nn.Module) -> int:
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(1, min([EXAMPLE_TOKENS, *sizes]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export warns about its own internals; what matters here is raised. All that others log goes on."""
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING or threading.get_ident() != thread

    loggers = [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if name.startswith("torch.")]
    for logger in loggers:
        logger.addFilter(is_of_others)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_others)


def without_fake_cache() -> contextlib.AbstractContextManager[None]:
    """Fake results are made anew each time, here and in all passes, whose fake mode is the one that export makes.

    To find one in torch's cache, a key is computed, and its symbolic strides again. With it, `optimize` of a model of
    two layers took half as long again; a model of 30 layers, which are alike, gained nothing by it.
    """
    patch: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return patch


def _bind_weights(program: ExportedProgram) -> fx.GraphModule:
    """Turn weight placeholders into attributes that share storage with the model."""
    signature = program.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(
                f"the forward writes `{spec.target}` ({spec.kind.name.lower()}); it must not change state"
            )
    root = nn.Module()
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inputs = {spec.arg.name: spec for spec in signature.input_specs}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node in placeholders:  # the user's inputs first: placeholders must lead the graph
        if inputs[node.name].kind is InputKind.USER_INPUT:
            values[node] = graph.node_copy(node)
    for node in placeholders:
        spec = inputs[node.name]
        if spec.kind is InputKind.USER_INPUT or not node.users:
            continue
        if spec.target is None:
            raise UnsupportedModelError(f"input `{node.name}` of kind {spec.kind.name} cannot be bound to a tensor")
        name = _free_name(root, spec.target.removeprefix("model.").replace(".", "_"))
        _register(root, name, _lookup(program, spec.target))
        values[node] = graph.get_attr(name)
        values[node].meta = dict(node.meta)
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(values[node.args[0][0]])
        elif node.op == "get_attr":  # what a higher-order op calls is a graph of its own
            name = _free_name(root, node.target)
            setattr(root, name, getattr(program.graph_module, node.target))
            values[node] = graph.get_attr(name)
            values[node].meta = dict(node.meta)
        elif node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # get_attr of flat names
        return _LazyGraphModule(root, graph, class_name="CapturedModel")


def _lookup(program: ExportedProgram, target: str) -> Tensor:
    value = program.state_dict.get(target, program.constants.get(target))
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(f"constant `{target}` is a {type(value).__name__}, not a tensor")
    return value


def _free_name(root: nn.Module, name: str) -> str:
    """`name`, lengthened until nothing in `root` has it: `w.1` and `w_1` are two weights."""
    while hasattr(root, name):
        name += "_"
    return name


def _register(root: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)


def _add_positions(graph_module: fx.GraphModule) -> None:
    ids = next(n for n in graph_module.graph.nodes if n.op == "placeholder")
    with graph_module.graph.inserting_after(ids):
        positions = graph_module.graph.placeholder("positions")
    positions.meta["val"] = torch.empty_like(ids.meta["val"], dtype=torch.int64)
    positions.meta["tensor_meta"] = None
