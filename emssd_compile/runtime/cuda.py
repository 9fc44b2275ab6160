"""What the launcher needs of CUDA: graphs, and copies that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CudaDevice:
    """Captures work and copies between host and device; nothing here but `capture` makes the host wait.

    The caller's work and the replays run on the caller's current stream. Beside it there is a stream on which graphs
    are captured (always the same: they share one memory pool) and one that copies to the host.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._captures = torch.cuda.Stream(device)
        self._copies = torch.cuda.Stream(device)
        # One pool for all graphs: they never run at once, and nothing they allocate outlives a replay.
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Run `work` once, then record it without running it; returns what replays the record.

        The first run compiles, tunes kernels and makes the libraries' handles, which a capture cannot. It is on the
        capturing stream, because cuBLAS has a workspace for each stream: the capture would take it from the pool for
        good. What `work` allocates in the capture stays in the pool, to be overwritten by the next replay of any graph:
        results have to be copied into tensors that existed before.
        """
        current = torch.cuda.current_stream(self.device)
        self._captures.wait_stream(current)
        with torch.cuda.stream(self._captures):
            work()
        current.wait_stream(self._captures)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # "thread_local": another thread (a loader that pins memory, say) must not be able to spoil the capture.
            torch.cuda.graph(graph, pool=self._pool, stream=self._captures, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay

    def upload(self, value: Tensor) -> Tensor:
        """`value` on the device, in the order of the current stream."""
        return value.pin_memory().to(self.device, non_blocking=True)

    def download(self, value: Tensor) -> tuple[Tensor, Callable[[], object]]:
        """A copy of `value` in host memory, and what waits until it is there.

        It is made beside the current stream, so later work there does not wait for it: nothing may write to `value`.
        """
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copies)
        value.record_stream(self._copies)  # its memory is not used again before the copy is made
        return host, copied.synchronize
