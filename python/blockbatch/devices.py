"""What is asked of the device that a model is on: turns of its decodes, and how much memory is free.

Decodes on one GPU take turns, a forward at a time: a thread that opens a decode or runs a step of one holds
the GPU's turn until the GPU is done with it. So no two decodes are at work at the same time whatever streams
their threads run on, scratch memory of the matrix library and of captured graphs is never shared by two of
them, and no graph is captured while another decode allocates or waits. What a decode gives is what it gives
alone. Decodes on the CPU share nothing and take no turns.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# Where the system does not tell.
_UNKNOWN_BYTES = 2**40
# What is left for what nobody counts: fragments, and memory of the driver for kernels that are loaded late.
_GPU_SHARE, _CPU_SHARE = 0.95, 0.9


class Turns:
    """The right to use one GPU, for one thread at a time; a thread that has it may take it again.

    A thread that gives it up and wants it back waits behind one that waits already.
    """

    def __init__(self) -> None:
        self._queue, self._turn = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def take(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            # Whoever waits for the turn holds the queue, and with it off all who come later.
            with self._queue:
                self._turn.acquire()
            self._owner = me
        self._depth += 1

    def give(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._turn.release()


_turns: dict[int, Turns] = {}


def current(device: torch.device) -> AbstractContextManager[None]:
    """A GPU as the current device meanwhile; on the CPU nothing.

    Events, captured steps and pinned memory belong to the current device, whatever the tensors are on.
    """
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """The turn of a GPU, which also is the current device meanwhile; on the CPU nothing."""
    if device.type != "cuda":
        yield
        return
    # One dictionary operation, which no other thread can come between.
    turns = _turns.setdefault(device.index, Turns())
    turns.take()
    try:
        with current(device):
            yield
    finally:
        turns.give()


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a device, less a margin.

    On a GPU: what the driver has free and what torch holds without using it, at most what the process may
    have (`torch.cuda.set_per_process_memory_fraction`). On the CPU what the system says is available.
    """
    if device.type != "cuda":
        available = _available_host_bytes()
        return _UNKNOWN_BYTES if available is None else int(available * _CPU_SHARE)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return int(max(0, min(free + reserved - allocated, fraction * total - allocated)) * _GPU_SHARE)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "total_page", "available_page")),
        *((name, ctypes.c_uint64) for name in ("total_virtual", "available_virtual", "extended")),
    ]


def _available_host_bytes() -> int | None:
    """Memory that the system has available; None where it does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # Linux, with what caches would give back
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    if hasattr(os, "sysconf"):
        try:
            pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # a system without these names, such as macOS
            return None
        return pages * size if pages > 0 and size > 0 else None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    try:
        told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    except (AttributeError, OSError):
        return None
    return status.available if told else None


def reclaim(device: torch.device) -> None:
    """Gives the memory of a GPU back that only cycles of references hold; nothing to do for the CPU.

    An engine is in one with the callbacks of its requests: its cache would wait for Python's garbage
    collection, which knows nothing of the GPU's memory.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def memory_errors(device: torch.device, what: str) -> Iterator[None]:
    """Turns torch's errors about memory into a MemoryError that says what did not fit.

    What a decode needs is checked before it begins; this remains where memory is cut into pieces, or another
    program takes some meanwhile.
    """
    try:
        yield
    except RuntimeError as error:
        # On the CPU the error has no class of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        first = str(error).split(". ")[0]
        raise MemoryError(
            f"free memory of {device}: expected room for {what}, got {free_bytes(device):,} bytes ({first})"
        ) from error
