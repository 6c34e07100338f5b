"""One process or many: who this one is, and what it does together with the others.

Every process holds the adapter whole and learns from its own rows. Only kilobytes learn, so the
gradients of a step are added up in one flat all-reduce after the backward pass, not by torch's
DistributedDataParallel. DDP averages where sums over rows or tokens must be added (processes do
not all get as many); it waits for a gradient of every parameter; it puts a wrapper around the model
that shows in every name; and what it is good at, hiding the traffic behind the backward pass,
buys nothing at this size. The same all-reduce serves a model whose base is sharded (`shard`).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from ..errors import FourierFTError, UsageError
from .shard import shard

Model = TypeVar("Model", bound=nn.Module)

WRITER = 0


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Methods that take part in a collective operation must be called by all of them, in the same
    order.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
        device: where this one computes.
        owned: whether `close` ends the process group: not where another library started it.
    """

    rank: int
    world: int
    device: torch.device
    owned: bool = False

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == WRITER

    def wrap(self, model: Model, shard_base: bool = False) -> Model:
        """The model on this process's device, with the writer's values in every process.

        Args:
            model: with its adapter injected and active; changed in place.
            shard_base: split the frozen base over the processes, a block at a time.

        Returns:
            The same model; there is no wrapper.

        Raises:
            UsageError: `shard_base` in a lone process; other models in other processes.
        """
        if shard_base and self.world == 1:
            raise UsageError(
                "shard_base",
                expected="several processes to spread the base over",
                found="one",
                remedy="start it with torchrun --nproc-per-node 2, or leave the option out",
            )
        if self.world == 1:
            return model.to(self.device)
        if shard_base:
            mesh = init_device_mesh(self.device.type, (self.world,))
            shard(model, mesh, self.device, self.level)
            return model
        model.to(self.device)
        self.level((*model.parameters(), *model.buffers()))
        return model

    def level(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the writer's values, in place.

        Only what differs travels: processes on one machine that mapped one file go on sharing it.

        Args:
            tensors: of the same shapes and dtypes, in the same order, everywhere.

        Raises:
            UsageError: they are not.
        """
        if self.world == 1:
            return
        mine = [tensor.detach() for tensor in tensors]
        facts = repr([(tuple(tensor.shape), tensor.dtype) for tensor in mine])
        if self._differs(torch.tensor([zlib.crc32(facts.encode())])).any():
            raise UsageError(
                f"process {self.rank} of {self.world}",
                expected="the same model in every process",
                found="tensors of other names, shapes or dtypes",
                remedy="give every process the same files and options",
            )
        differs = self._differs(torch.tensor([_checksum(tensor) for tensor in mine]))
        for tensor, travels in zip(mine, differs.tolist(), strict=True):
            if travels:
                dense = tensor.contiguous()
                with self._together():
                    distributed.broadcast(dense, WRITER)
                tensor.copy_(dense)

    def _differs(self, numbers: Tensor) -> Tensor:
        """Where anybody's numbers are not the writer's: bool, of their shape."""
        writers = numbers.clone()
        with self._together():
            distributed.broadcast(writers, WRITER)
        return self.sum((numbers != writers).int()) > 0

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one message.

        A parameter without a gradient counts as zero; without one in every process it keeps none,
        as in a lone process. Sums are taken in float32 or better.

        Args:
            parameters: the same ones in the same order everywhere.
        """
        if self.world == 1:
            return
        learning = [p for p in parameters if p.requires_grad]
        dtype = torch.float32
        for parameter in learning:
            dtype = torch.promote_types(dtype, parameter.dtype)
        present = torch.tensor([float(p.grad is not None) for p in learning], dtype=dtype)
        pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]
        flat = torch.cat([t.to(self.device, dtype) for t in (*pieces, present)])
        with self._together():
            distributed.all_reduce(flat)
        *sums, present = flat.split([*(p.numel() for p in learning), len(learning)])
        for parameter, total, count in zip(learning, sums, present.tolist(), strict=True):
            if count:
                parameter.grad = total.view_as(parameter).to(parameter.dtype, copy=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensor, as a new one; shape, dtype and device are kept."""
        total = tensor.detach().clone()
        if self.world > 1:
            with self._together():
                distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether anybody's flag is set."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def barrier(self) -> None:
        """Wait until everybody is here."""
        self.any(False)

    def close(self) -> None:
        """Leave the others, once all is done."""
        if self.owned and distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """For a collective operation, which fails when another process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise FourierFTError(
                f"process {self.rank} of {self.world}",
                expected="all processes to go on together",
                found=f"that another one is gone: {(str(error).splitlines() or [''])[0]}",
                remedy="what was saved last is intact; see what the other one said, then resume",
            ) from error


def join(device: str | None = None) -> Processes:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: "cpu", "cuda", ...; by default CUDA where there is one. With many processes on
            CUDA each takes the device of its own LOCAL_RANK.

    Raises:
        UsageError: a device that is unknown, absent, or not for many processes; variables of the
            environment that make no sense.
    """
    rank, world, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world is None or world == 1:
        return Processes(0, 1, _lone_device(kind))
    if rank is None or not 0 <= rank < world:
        raise UsageError(
            "RANK and WORLD_SIZE",
            expected="a rank from 0 to below the world's size, as torchrun sets them",
            found=f"{rank} and {world}",
        )
    place = _shared_device(kind, rank if local is None else local)
    owned = not distributed.is_initialized()
    if owned:
        # Flags and counts travel between hosts' memories, whatever the device.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if place.type == "cuda":
            torch.cuda.set_device(place)
        distributed.init_process_group(backend, rank=rank, world_size=world)
    return Processes(rank, world, place, owned)


def _checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, as int64 with overflow."""
    flat = tensor.contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    word = torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8
    return int(flat.view(torch.uint8).view(word).sum(dtype=torch.int64))


def _number(name: str) -> int | None:
    """A variable of the environment as an integer; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(name, expected="a number, as torchrun sets it", found=repr(text)) from None


def _lone_device(kind: str) -> torch.device:
    try:
        device = torch.device(kind)
        torch.empty(0, device=device)
    # An unknown name, a build without that device, a machine without it: torch's errors differ.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _no_device(kind, str(error).splitlines()[0]) from error
    return device


def _shared_device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise UsageError(
            f"device {kind}",
            expected="cpu or cuda, without a number, where several processes train together",
            remedy="each process takes the device of its own LOCAL_RANK",
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise _no_device(f"cuda:{local_rank}", f"{count} CUDA devices on this machine")
    return torch.device("cuda", local_rank)


def _no_device(device: str, found: str) -> UsageError:
    return UsageError(
        f"device {device}",
        expected="a device that this machine and this build of torch have",
        found=found,
        remedy="use --device cpu, or as many processes as there are devices",
    )
