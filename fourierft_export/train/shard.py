"""A frozen base spread over processes, block by block, with torch's FSDP2 (`fully_shard`).

Each process keeps its part of every base tensor; a block (a transformer layer) is gathered when it
is used and let go again. The base never learns, so nothing of it is ever reduced. What adapters
bring is left whole in every process, and learns as it does without sharding.

Memory: a process starts from a model that it has loaded like any other. transformers maps the file
of a checkpoint in the dtype that it is stored in, so that no process holds a copy, and only the
pages of its own parts are read twice. A checkpoint that is converted on loading is whole in every
process for a moment; blocks are let go one after another as they are spread.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..adapt.modules import adapter_names, fourier_layers, saved_tensors

_M_MMAP_THRESHOLD = -3  # malloc.h


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    level: Callable[[Iterable[Tensor]], None],
) -> None:
    """Spread the base of an adapted model over the processes of a mesh.

    Adapters that are put on the model afterwards work, but must bring spectra only.

    Args:
        model: with its adapters on; changed in place.
        mesh: one dimension, of the device's type.
        device: where this process computes.
        level: makes the tensors that it gets equal in all processes; called for a block at a time,
            before the block is spread.
    """
    if device.type == "cpu":
        _free_at_once()
    whole = whole_parameters(model)
    done: set[int] = set()
    for part in (*blocks(model), model):
        tensors = [
            tensor
            for tensor in (*part.parameters(), *part.buffers())
            if not isinstance(tensor, DTensor) and id(tensor) not in done
        ]
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        level(tensors)
        done.update(id(tensor) for tensor in tensors)
        fully_shard(part, mesh=mesh, ignored_params=whole)


def _free_at_once() -> None:
    """Let glibc give memory of a megabyte and more back to the system as soon as it is free.

    It learns otherwise to keep blocks of up to 32 MB, and a process that gathers and frees one
    layer after another ends up with more than the whole base.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are gathered one at a time: the items of the outermost lists of modules.

    What none of them holds (embeddings, a final norm, a head) is gathered as one more part.
    """
    return list(dict.fromkeys(_blocks(model)))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    listed = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child in module.children():
        # A list of lists is never called itself, and only a call gathers what is needed.
        if listed and type(child).forward is not nn.Module.forward:
            yield child
        else:
            yield from _blocks(child)


def whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those that stay whole in every process: all that adapters bring, and all that learns."""
    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in fourier_layers(model).values():
        whole.update(layer.adapters.parameters())
    for name in adapter_names(model):
        own = saved_tensors(model, name).values()
        whole.update(tensor for tensor in own if isinstance(tensor, nn.Parameter))
    return whole
