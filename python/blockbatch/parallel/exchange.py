"""Parts of keys and values on their way between ranks: each rank has a part for every other one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockbatch.parallel.transport import HostTransport

# Called with the parts of all ranks, in their order, and which pages of the whole they are.
Receive = Callable[[list[Tensor], slice], None]
# Of symmetric memory; more goes in pieces. Two ranks pass a layer's keys and values of 2048 tokens.
_BUFFER_BYTES = 64 << 20
_TURNS = 2


class HostExchange:
    """gloo, for tensors on the CPU: every rank collects all parts and keeps its own."""

    def __init__(self, transport: HostTransport, rank: int) -> None:
        self._transport, self._rank = transport, rank

    def send(self, parts: Sequence[Tensor], receive: Receive) -> None:
        """Gives part r to rank r, and calls `receive` with what all gave this one.

        Args:
            parts: [2, pages, ...] each, of the same shape on all ranks; what the current stream does behind
                the next `send`, or behind `finish`, may overwrite them.
        """
        everything = self._transport.all_gather(torch.stack(list(parts)))
        receive(list(everything[:, self._rank]), slice(0, parts[0].shape[1]))

    def finish(self) -> None:
        """What was received is there for the current stream."""


class NcclExchange:
    """NCCL, for GPUs that do not reach each other's memory."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, parts: Sequence[Tensor], receive: Receive) -> None:
        """See `HostExchange.send`."""
        sent = [part.contiguous() for part in parts]
        received = [torch.empty_like(part) for part in sent]
        dist.all_to_all(received, sent, group=self._group)
        receive(received, slice(0, parts[0].shape[1]))

    def finish(self) -> None:
        pass


class SymmetricExchange:
    """torch's symmetric memory, on a side stream: a rank writes into the others' buffers and reads its own.

    A buffer has two turns. A rank writes a turn again once all have met behind the send in between, to which
    each comes behind its reading of that turn.

    Args:
        group: any group of the ranks; it only carries the addresses.
        device: this rank's GPU.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch._C._distributed_c10d import _SymmetricMemory

        self._rank, self._size, self._device = dist.get_rank(group), group.size(), device
        self._memory = _SymmetricMemory.empty_strided_p2p((_BUFFER_BYTES,), (1,), torch.uint8, device)
        self._handle: Any = _SymmetricMemory.rendezvous(self._memory, group.group_name)
        self._part_bytes = _BUFFER_BYTES // _TURNS // self._size // 16 * 16
        self._buffers = [
            self._handle.get_buffer(rank, (_BUFFER_BYTES,), torch.uint8) for rank in range(self._size)
        ]
        self._side, self._done, self._turn = torch.cuda.Stream(device), torch.cuda.Event(), 0

    def send(self, parts: Sequence[Tensor], receive: Receive) -> None:
        """See `HostExchange.send`; `receive` is for the side stream, and done behind `finish`."""
        pages = parts[0].shape[1]
        most = self._part_bytes // (parts[0].nbytes // pages)
        if most < 1:
            raise ValueError(f"parts: expected pages of at most {self._part_bytes} bytes, got more")
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for first in range(0, pages, most):
                piece = slice(first, min(first + most, pages))
                here = [part[:, piece] for part in parts]
                self._send(here)
                found = [self._place(self._rank, sender, part) for sender, part in enumerate(here)]
                found[self._rank] = here[self._rank]
                receive(found, piece)
                self._turn = (self._turn + 1) % _TURNS
            self._done.record(self._side)

    def finish(self) -> None:
        """What was received is there for the current stream."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _send(self, parts: Sequence[Tensor]) -> None:
        """Writes into the buffers, and waits until all have.

        From one piece of memory into one: such copies leave the processors to products that run meanwhile.
        """
        for step in range(1, self._size):  # each rank begins with another one
            receiver = (self._rank + step) % self._size
            words = as_words(parts[receiver]).contiguous()
            self._place(receiver, self._rank, words).copy_(words)
        self._handle.barrier(0)

    def _place(self, receiver: int, sender: int, like: Tensor) -> Tensor:
        """Where `sender` writes for `receiver` in this turn, as a tensor of the same shape and dtype."""
        start = (self._turn * self._size + sender) * self._part_bytes
        return self._buffers[receiver][start : start + like.nbytes].view(like.dtype).view(like.shape)


def as_words(x: Tensor) -> Tensor:
    """The same bits in elements of 8 bytes where the last dimension has whole ones: faster to copy."""
    size = 8 // x.element_size()
    whole = x.stride(-1) == 1 and all(
        number % size == 0 for number in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    )
    return x.view(torch.int64) if whole else x
