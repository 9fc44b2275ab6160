"""One process, or several that share the windows of each step: started by torchrun or `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from emssd_compile.errors import OptionError

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, DynamoBackend
except ImportError as error:
    raise OptionError('training is done with accelerate; pip install "emssd_compile[train]"') from error

__all__ = ["Accelerator", "accelerator", "launched"]

_KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def accelerator(*, cpu: bool = False) -> Accelerator:
    """What the processes of a run do together; each has the whole head, and a share of the windows.

    Args:
        cpu: whether they compute on CPUs, where there are GPUs, too.

    Raises:
        OptionError: `accelerate launch` was told what this command says by options of its own, or to cut up or compile
            the head; or processes were launched that do not find one another.
    """
    same = DistributedDataParallelKwargs(broadcast_buffers=False)  # buffers are constants, the same everywhere
    made = Accelerator(cpu=cpu and _count() > 1, device_placement=False, kwargs_handlers=[same])
    if made.distributed_type not in _KNOWN:
        raise OptionError(
            f"a head is trained whole in each process, not by {made.distributed_type.value}; launch it with --multi_gpu"
        )
    if made.mixed_precision != "no":
        raise OptionError(f"launched with --mixed_precision {made.mixed_precision}: leave it out, and pass --dtype")
    if made.gradient_accumulation_steps != 1:
        raise OptionError("launched with --gradient_accumulation_steps: leave it out, and pass --accumulate")
    if made.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise OptionError("launched with --dynamo_backend: leave it out, a head is trained as it is written")
    if made.num_processes != _count():
        raise OptionError(
            f"{_count()} processes were launched, and this one is one of {made.num_processes}; launch them by torchrun "
            "or accelerate launch"
        )
    return made


@contextlib.contextmanager
def launched(name: str | None) -> Iterator[tuple[Accelerator, torch.device]]:
    """The processes that were launched, connected, and where this one computes.

    Args:
        name: of a device; None for a GPU if there is one. Of several processes, each has a GPU of its own.

    Raises:
        OptionError: there is no such device, or what `accelerator` says.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    device = _usable(name)
    if _count() > 1 and device.index is not None:
        raise OptionError(f"--device {name}: each of {_count()} processes has a device of its own; pass {device.type}")
    processes = accelerator(cpu=device.type == "cpu")
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", processes.local_process_index)
        torch.cuda.set_device(device)
    try:
        yield processes, device
    finally:
        processes.end_training()


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _usable(name: str) -> torch.device:
    """The device of that name. Raises OptionError if there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {name} cannot be used: {reason}; pass cpu, or a device of this machine") from error
    return device
