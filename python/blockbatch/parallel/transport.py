"""How tensors travel between ranks. Each way adds parts in the order of the ranks or once for all of them, so
that every rank gets the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockbatch_kernels.cuda import peers

# Beyond, each rank adds up a part and all read the sums: less travels, at the price of a second meeting.
ONE_SHOT_BYTES = 128 << 10
# Of symmetric memory; larger tensors go in pieces.
_BUFFER_BYTES = 32 << 20
_SLOT_BYTES = 4 << 20
# Of an inbox for fused sums: two ranks pass 2048 tokens of 4096 numbers in fp32.
_INBOX_BYTES = 64 << 20
# With more than two ranks an all-to-all of larger parts sends more than sums in two steps do.
_FUSED_BYTES = 1 << 20
# How often a rank that waits on the host looks whether the others are still there.
_LOOK = timedelta(milliseconds=200)


class HostTransport:
    """gloo, for tensors on the CPU: every rank collects all parts and adds them up, rank 0's first.

    Args:
        group: a gloo group.
        check: raises if the others are not there any more.
    """

    name = "gloo"

    def __init__(self, group: dist.ProcessGroup, check: Callable[[], None]) -> None:
        self._group, self._check = group, check
        self._size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in x's dtype."""
        parts = self.all_gather(x)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: what each rank gave."""
        parts = x.new_empty(self._size, *x.shape)
        work = dist.all_gather(list(parts), x.contiguous(), group=self._group, async_op=True)
        while True:
            try:
                work.wait(_LOOK)
                return parts
            except RuntimeError:
                if work.is_completed():
                    raise
                self._check()


class NcclTransport:
    """NCCL, for GPUs that do not reach each other's memory and for float16."""

    name = "nccl"

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        # Connections are made at the first call, which must not be in a capture.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: what each rank gave."""
        parts = x.new_zeros(self._size, *x.shape)
        parts[self._rank] = x
        return self.all_reduce(parts)  # every number is added to zeros alone


class SymmetricTransport:
    """torch's symmetric memory: kernels that read the other GPUs' buffers over NVLink, one launch for a sum.

    Its kernels add rank 0's part first, in x's dtype (bf16 or fp32). Buffers are allocated here, once:
    captured steps refer to them. Multicast is not used.

    Args:
        group: any group of the ranks; it only carries the addresses.
        device: this rank's GPU.
        dtype: of the tensors that are added up.
        lanes: transports of these ranks that are at work at the same time.
        fused: whether `all_reduce_norm` is wanted; the same on all ranks.
    """

    name = "symmetric"

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lanes: int = 1,
        fused: bool = False,
    ) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch._C._distributed_c10d import _SymmetricMemory

        self._group_name, self._rank, self._size = group.group_name, dist.get_rank(group), group.size()

        def buffer(nbytes: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
            found = _SymmetricMemory.empty_strided_p2p((nbytes // dtype.itemsize,), (1,), dtype, device)
            return found, _SymmetricMemory.rendezvous(found, self._group_name)

        self._buffer, self._meeting = buffer(_BUFFER_BYTES, dtype)
        self._buffers = [
            self._meeting.get_buffer(rank, self._buffer.shape, dtype) for rank in range(self._size)
        ]
        self._slots = self._buffer if dtype == torch.float32 else buffer(_SLOT_BYTES, torch.float32)[0]
        self.inboxes: peers.Inboxes | None = None
        if fused and 1 < self._size <= peers.MOST_RANKS:
            self._inbox, self._handle = buffer(_INBOX_BYTES, torch.uint8)
            self._inbox.fill_(peers.NOT_THERE)
            torch.cuda.synchronize(device)
            dist.barrier(group)  # before anybody writes there
            self._theirs = [
                self._handle.get_buffer(rank, self._inbox.shape, torch.uint8) for rank in range(self._size)
            ]
            source_bytes = _INBOX_BYTES // peers.TURNS // (self._size - 1) // 16 * 16
            turn = torch.zeros(2, dtype=torch.int32, device=device)
            addresses = tuple(inbox.data_ptr() for inbox in self._theirs)
            self.inboxes = peers.Inboxes(addresses, self._rank, source_bytes, turn, lanes)

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float32)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; it may lie in the buffer that the next call overwrites."""
        x = x.contiguous()
        return self._reduce(x, self._buffer_of(x))

    def all_reduce_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, *, eps: float, quantized: bool, alone: bool
    ) -> Any:
        """The norm of the sum over all ranks, see `peers.all_reduce_norm`; None: not of these tensors."""
        if self.inboxes is None or (self._size > 2 and x.nbytes > _FUSED_BYTES):
            return None
        if not peers.takes(x, weight, residual, self.inboxes.source_bytes):
            return None
        return peers.all_reduce_norm(
            x, weight, residual, self.inboxes, eps=eps, quantized=quantized, alone=alone
        )

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: what each rank gave."""
        if x.dtype == self._buffer.dtype and x.nbytes > ONE_SHOT_BYTES:
            return self._read(x)
        parts = x.new_zeros(self._size, *x.shape)
        parts[self._rank] = x
        return self._reduce(parts, self._buffer_of(x), keep=True)  # every number is added to zeros alone

    def _read(self, x: Tensor) -> Tensor:
        """As `all_gather`, from the buffers of the others: nothing is moved that they have already."""
        parts, flat = x.new_empty(self._size, *x.shape), x.reshape(-1)
        lines = parts.view(self._size, -1)
        lines[self._rank] = flat
        for start in range(0, flat.numel(), self._buffer.numel()):
            own = flat[start : start + self._buffer.numel()]
            self._buffer[: own.numel()] = own
            self._meeting.barrier(0)  # all have written
            for step in range(1, self._size):  # each rank begins with another one
                rank = (self._rank + step) % self._size
                lines[rank, start : start + own.numel()] = self._buffers[rank][: own.numel()]
            self._meeting.barrier(0)  # all have read
        return parts

    def sum_of(self, flat: Tensor, *, two_shot: bool) -> Tensor:
        """The sum of a flat tensor of the model's dtype that fits into the buffer, by the named way."""
        return self._sum(flat, self._buffer, two_shot)

    def _buffer_of(self, x: Tensor) -> Tensor:
        return self._buffer if x.dtype == self._buffer.dtype else self._slots

    def _reduce(self, x: Tensor, buffer: Tensor, *, keep: bool = False) -> Tensor:
        flat = x.view(-1)
        if flat.numel() <= buffer.numel():
            return self._sum(flat, buffer, not keep and flat.nbytes > ONE_SHOT_BYTES).view(x.shape)
        total = torch.empty_like(flat)
        for start in range(0, flat.numel(), buffer.numel()):
            part = slice(start, start + buffer.numel())
            total[part] = self._sum(flat[part], buffer, True)
        return total.view(x.shape)

    def _sum(self, flat: Tensor, buffer: Tensor, two_shot: bool) -> Tensor:
        place = buffer[: flat.numel()]
        if not two_shot:
            return torch.ops.symm_mem.one_shot_all_reduce_copy(place, flat, "sum", self._group_name)
        place.copy_(flat)
        return torch.ops.symm_mem.two_shot_all_reduce_(place, "sum", self._group_name)
