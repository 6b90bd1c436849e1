"""Processes that hold a model together, for tests: each does what it is told, and all answer."""

import multiprocessing
import os
import tempfile
import time
import traceback

import pytest
import torch

DEVICE = "cpu"  # of a process that was started here
_GRACE_SECONDS = 60  # of a rank's answer, once another one failed


class Failure:
    """The exception that a rank answered with; of type "Ended" for a process that is no more."""

    def __init__(self, error=None):
        self.type = "Ended" if error is None else type(error).__name__
        self.text, self.trace = str(error), traceback.format_exc()

    def __repr__(self):
        return f"{self.type}: {self.text}\n{self.trace}"


class RankProcesses:
    """`size` processes in one process group over gloo; `run` calls a function of a module on all of them.

    What they compute is on `device`: the CPU, or "cuda", a GPU for each.

    Answers are what it returned on each rank, or a `Failure`.
    """

    def __init__(self, size, device="cpu"):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, device, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *args, timeout=300, **options):
        for pipe in self.pipes:
            pipe.send((function, args, options))
        end, answers = time.monotonic() + timeout, []
        for rank in range(len(self.pipes)):
            answers.append(self._answer(rank, end))
            if isinstance(answers[-1], Failure):  # the others may wait for this one for ever
                end = min(end, time.monotonic() + _GRACE_SECONDS)
        return answers

    def values(self, function, *args, **options):
        """What every rank returned; fails the test if one raised."""
        answers = self.run(function, *args, **options)
        wrong = [answer for answer in answers if isinstance(answer, Failure)]
        assert not wrong, wrong
        return answers

    def same(self, function, *args, **options):
        """The one answer that all ranks gave."""
        first, *others = self.values(function, *args, **options)
        assert all(other == first for other in others)
        return first

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _answer(self, rank, end):
        pipe = self.pipes[rank]
        try:
            if not pipe.poll(max(0.0, end - time.monotonic())):
                return Failure(TimeoutError(f"rank {rank} gave no answer"))
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return Failure()


def fixture(size, device="cpu", scope="module"):
    """A fixture of `RankProcesses`, started once for a module; with `scope` "function" for each test."""

    @pytest.fixture(scope=scope)
    def ranks():
        processes = RankProcesses(size, device)
        yield processes
        processes.close()

    return ranks


def _serve(rank, size, store, device, pipe):
    global DEVICE
    DEVICE = device
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(*args, **options)
        except Exception as error:
            answer = Failure(error)
        pipe.send(answer)
