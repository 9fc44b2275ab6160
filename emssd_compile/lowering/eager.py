"""Run the step graph op by op."""

from collections.abc import Callable

from torch import Tensor, fx


def lower_eager(graph_module: fx.GraphModule) -> Callable[..., dict[str, Tensor]]:
    """The graph as it is: nothing to wait for, and what every other backend is compared with."""
    return graph_module
