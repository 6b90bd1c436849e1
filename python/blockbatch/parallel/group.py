"""The processes that hold one model together."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.parallel import digest
from blockbatch.parallel.exchange import HostExchange, NcclExchange, SymmetricExchange
from blockbatch.parallel.transport import HostTransport, NcclTransport, SymmetricTransport
from blockbatch.parallel.watch import RankError, Watch
from blockbatch.values import as_int
from blockbatch_kernels.cuda import peers

# What torchrun tells each process, beside where they meet.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A forward that takes longer stands still. The first one may compile kernels, and a large model on a CPU may
# well need minutes for each.
_STALL_SECONDS = {"cuda": 300.0, "cpu": 1800.0}
# Of torch's own clocks, which only know how long they wait, not whether anybody is left to wait for.
_PATIENCE = timedelta(days=1)
# By `transport`, for GPUs; None takes the first that runs.
TRANSPORTS = ("symmetric", "nccl")


class RankGroup:
    """The ranks of one model; every one makes it at the same time, in the process group that is there.

    Attributes:
        rank, size: of this process.
        transport: "symmetric", "nccl" or "gloo": how tensors travel.
        watch: knows whether the others are still there.
        most_lanes: transports that may be at work at the same time.
        alone: whether no more than one of them is.

    Args:
        device: this rank's; its own GPU, or the CPU on all ranks.
        dtype: of the model.
        transport: one of `TRANSPORTS`; None: the first that runs. On the CPU it is gloo.
        stall_seconds: how long a forward may take at most; None: 300 on a GPU, 1800 on the CPU.
        lanes: see `most_lanes`.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        transport: str | None = None,
        stall_seconds: float | None = None,
        lanes: int = 1,
    ) -> None:
        if transport not in (None, *TRANSPORTS):
            raise ValueError(f"transport: expected None or one of {', '.join(TRANSPORTS)}, got {transport!r}")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self._dtype = device, dtype
        self.most_lanes, self.alone, self._fused = lanes, True, False
        # Numbers of the host travel by gloo whatever the device: nobody waits for a GPU because of them.
        self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._lock = threading.Lock()
        seconds = _STALL_SECONDS[device.type] if stall_seconds is None else stall_seconds
        self.watch = Watch(self.rank, self.size, self.from_first, stall_seconds=seconds)
        atexit.register(self.watch.close)
        self._host = HostTransport(self._control, self.watch.check)
        self._transport = self._host if device.type == "cpu" else self._on_gpus(dtype, transport)
        self.transport = self._transport.name
        self._check_sums(dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, the same bits on every rank.

        Args:
            x: of the model's dtype; may be overwritten.

        Returns:
            a tensor of x's shape, valid until the next call.
        """
        return self._transport.all_reduce(x)

    def all_reduce_norm(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        *,
        eps: float,
        quantized: bool = False,
        backend: str | None = None,
    ) -> Any:
        """`bbk.rms_norm`, or `bbk.rms_norm_fp8` if `quantized`, of the sum of all ranks' x.

        In one kernel where symmetric memory and the extension are there. The bits are those of the two steps.

        Args:
            x: [tokens, dim] of the model's dtype; may be overwritten.
            weight: [dim].
            residual: [tokens, dim]; *written*: the sum of all x and itself.
        """
        if self._transport.name == "symmetric" and backend in (None, "cuda"):
            options = dict(eps=eps, quantized=quantized, alone=self.alone)
            found = self._transport.all_reduce_norm(x, weight, residual, **options)
            if found is not None:
                return found
        norm = bbk.rms_norm_fp8 if quantized else bbk.rms_norm
        return norm(self.all_reduce(x), weight, eps=eps, residual=residual, backend=backend)

    def merge_head(self, parts: Tensor, *, probes: bool) -> Any:
        """See `peers.merge_head`; None where the kernel does not run."""
        inboxes = getattr(self._transport, "inboxes", None)
        if inboxes is None or parts.nbytes > inboxes.source_bytes:
            return None
        return peers.merge_head(parts, inboxes, probes=probes)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the x of every rank, all of one shape, in fp32 or the model's dtype."""
        return self._transport.all_gather(x)

    def exchange_parts(self) -> HostExchange | NcclExchange | SymmetricExchange:
        """A way for keys and values between ranks; made on all of them at the same time."""
        if self.transport == "gloo":
            return HostExchange(self._host, self.rank)
        if self.transport == "symmetric":
            return SymmetricExchange(self._control, self.device)
        return NcclExchange(dist.new_group(backend="nccl", timeout=_PATIENCE))

    def another_transport(self) -> SymmetricTransport:
        """Symmetric memory for sums beside those of the group; made on all ranks at the same time."""
        return self._symmetric()

    @contextmanager
    def through(self, transport: SymmetricTransport) -> Iterator[None]:
        """Sums and collections go through another transport meanwhile."""
        usual, self._transport = self._transport, transport
        try:
            yield
        finally:
            self._transport = usual

    def exchange(self, what: str, value: int = 0, *, patient: bool = False) -> list[int]:
        """The value of every rank, on the host.

        Args:
            what: the place in the program, which must be the same on all ranks.
            value: of 63 bits and a sign.
            patient: whether the others may take any time to come here.

        Raises:
            RankError: a rank ended, or is at another place.
        """
        row = torch.tensor([digest.of_text(what), value], dtype=torch.int64, device="cpu")
        self.watch.enter(what, patient=patient)
        try:
            rows = self._host.all_gather(row).tolist()
        except RankError:
            raise
        except RuntimeError as error:
            self._blame(error)
            raise
        finally:
            self.watch.leave()
        others = [str(rank) for rank, (place, _) in enumerate(rows) if place != int(row[0])]
        if others:
            raise self.refuse(f"{what}: expected all ranks here, rank {', '.join(others)} is elsewhere")
        return [found for _, found in rows]

    def agree(self, what: str, value: int) -> None:
        """Raises RankError unless every rank gives the same value."""
        values = self.exchange(what, value)
        others = [str(rank) for rank, found in enumerate(values) if found != values[0]]
        if others:
            raise self.refuse(
                f"{what}: expected the same on all ranks, rank {', '.join(others)} differs from rank 0"
            )

    def least(self, what: str, value: int) -> int:
        """The least of all ranks' values."""
        return min(self.exchange(what, value))

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """Around what each rank does by itself: all leave it together, or none, after a failure of one."""
        try:
            yield
        except BaseException as error:
            self.watch.fail(_first_line(error))
            raise
        self.exchange(f"the end of loading {what}", patient=True)

    @contextmanager
    def forward(self, what: str) -> Iterator[None]:
        """Around what waits for the other ranks: a failure there ends it here, and one here ends it there.

        Raises:
            RankError: a rank ended or failed.
            RuntimeError: another thread of this process is in a forward of this model.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "model: expected one thread at a time to use a model of several ranks, since forwards must "
                "come in the same order everywhere; another one is in a forward"
            )
        try:
            self.watch.enter(what)
            yield
        except RankError:
            raise
        except RuntimeError as error:
            self._blame(error)
            raise
        except BaseException as error:
            self.watch.fail(_first_line(error))
            raise
        finally:
            self.watch.leave()
            self._lock.release()

    def refuse(self, message: str) -> RankError:
        """An error that every rank raises by itself; nothing runs on this model any more."""
        self.watch.failure = self.watch.failure or message
        return RankError(message)

    def from_first(self, text: str) -> str:
        """The text that rank 0 passed, on every rank."""
        texts = [text]
        dist.broadcast_object_list(texts, src=0, group=self._control)
        return texts[0]

    def _blame(self, error: RuntimeError) -> None:
        """Raises RankError if another rank's failure is behind an error; else tells the others of it."""
        failure = self.watch.wait_for_failure(1.0)
        if failure is not None:
            raise RankError(failure) from error
        self.watch.fail(_first_line(error))

    def _on_gpus(self, dtype: torch.dtype, wanted: str | None) -> SymmetricTransport | NcclTransport:
        devices = self.exchange("device", self.device.index)
        if len(set(devices)) < self.size:
            found = ", ".join(f"cuda:{index}" for index in devices)
            raise ValueError(f"device: expected another GPU for every rank, got {found}")
        if wanted == "symmetric" and not SymmetricTransport.takes(dtype):
            raise ValueError(f"transport: expected bfloat16 or float32 for 'symmetric', got {dtype}")
        if wanted != "nccl" and SymmetricTransport.takes(dtype):
            self._fused = bool(self.least("fused sums", int(peers.sums_run_on(self.device))))
            made, why = None, None
            try:
                made = self._symmetric()
            except RuntimeError as error:
                why = _first_line(error)
            if self.least("symmetric memory", int(made is not None)):
                return made
            if wanted is not None:
                raise RuntimeError(
                    f"transport: expected GPUs that reach each other's memory for 'symmetric', got {why}"
                )
        return NcclTransport(dist.new_group(backend="nccl", timeout=_PATIENCE), self.device)

    def _symmetric(self) -> SymmetricTransport:
        options = dict(lanes=self.most_lanes, fused=self._fused)
        return SymmetricTransport(self._control, self.device, self._dtype, **options)

    def _check_sums(self, dtype: torch.dtype) -> None:
        """Raises RankError unless known numbers come out right on every rank."""
        for count in (8, 1 << 20):  # small and large sums go different ways
            numbers = torch.arange(count, device=self.device) % 8 + 1
            total = self.all_reduce((numbers * (self.rank + 1)).to(dtype))
            right = torch.equal(total, (numbers * (self.size * (self.size + 1) // 2)).to(dtype))
            if not self.least(f"a sum of {count} numbers", int(right)):
                raise self.refuse(
                    f"all_reduce by {self.transport}: expected the right sum of {count} numbers"
                )
        collected = self.all_gather(torch.full((3,), float(self.rank), device=self.device))
        right = collected[:, 0].tolist() == list(range(self.size))
        if not self.least("numbers collected", int(right)):
            raise self.refuse(f"all_gather by {self.transport}: expected the numbers of all ranks in order")
        if self._fused and self.transport == "symmetric":
            self._check_fused(dtype)

    def _check_fused(self, dtype: torch.dtype) -> None:
        """Raises RankError unless sums with a norm behind them have the bits of the two steps."""
        numbers = torch.arange(8 * 256, device=self.device) * (self.rank + 1) % 61 - 30
        numbers = numbers.view(8, 256).to(dtype)
        weight, residuals = numbers[3].clone(), (torch.ones_like(numbers), torch.ones_like(numbers))
        fused = self.all_reduce_norm(numbers, weight, residuals[0], eps=1e-5)
        plain = bbk.rms_norm(self.all_reduce(numbers), weight, eps=1e-5, residual=residuals[1])
        right = torch.equal(fused, plain) and torch.equal(*residuals)
        if not self.least("a sum and its norm", int(right)):
            raise self.refuse("all_reduce_norm: expected the bits of all_reduce and rms_norm")


def started_by_torchrun() -> bool:
    """Whether the environment says which of several processes this is."""
    return all(name in os.environ for name in _ENVIRONMENT)


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def device_of_rank(size: int, device: str | torch.device | None) -> str | torch.device | None:
    """The device that this process takes, once it is known to be one of `size`; `device` itself for one.

    Args:
        size: processes that are to hold a model together.
        device: as it was asked for; None or "cuda": the GPU of the local rank, where there are GPUs.

    Raises:
        ValueError, RuntimeError: there are no such processes, naming what was expected and what came.
    """
    given, size = size, as_int(size)
    if size is None or size < 1:
        raise ValueError(f"tensor_parallel: expected a positive integer, got {given!r}")
    if size == 1:
        return device
    _start(size)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device) == torch.device("cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    return device


def _start(size: int) -> None:
    """Makes torchrun's processes a process group unless they are one."""
    if not dist.is_available():
        raise RuntimeError("tensor_parallel: expected a torch with torch.distributed, got one without")
    if dist.is_initialized():
        found = dist.get_world_size()
    elif started_by_torchrun():
        found = int(os.environ["WORLD_SIZE"])
    else:
        raise ValueError(
            f"tensor_parallel: expected {size} processes, of `torchrun --nproc-per-node {size}` or of a "
            "torch.distributed process group, got one alone"
        )
    if found != size:
        raise ValueError(f"tensor_parallel: expected the number of processes, {found}, got {size}")
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
