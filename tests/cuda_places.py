"""Where the compiled policy, pack and page operators are tested: their one source runs on the GPU and, for
machines without one, in the calling thread."""

import contextlib
import types

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, reference
from blockbatch_kernels.ops import dispatch

OPS = ("decode_policy", "initial_plan", "pack_windows", "share_pages", "copy_pages")


class Place:
    """The five operators on a device: through the front door on the GPU, the extension directly on the host,
    which the front door does not offer."""

    def __init__(self, device):
        self.device = torch.device(device)
        for op in OPS:
            setattr(self, op, self._gpu(op) if device == "cuda" else getattr(cuda, op))

    @staticmethod
    def _gpu(op):
        return lambda *args, **options: getattr(bbk, op)(*args, **options, backend="cuda")

    @contextlib.contextmanager
    def default(self, monkeypatch):
        """Meanwhile the front door takes the compiled operators for tensors of this place."""
        served = types.SimpleNamespace(**{**vars(reference), **{op: getattr(cuda, op) for op in OPS}})
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "module_for", lambda name, op, example, **sizes: served)
            yield


PLACES = [pytest.param("cpu", id="host"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]


def open_place(device):
    """The place, for one of PLACES."""
    pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    return Place(device)


def check_seeds(check, seeds):
    for seed in seeds:
        try:
            check(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def random_table(rng, requests, branches, columns):
    """A table in which rows share pages, and some have none."""
    choice = torch.randint(0, branches, (requests, branches, columns))
    if rng.random() < 0.5:
        choice = torch.arange(branches).view(1, -1, 1).expand_as(choice)
    first = torch.arange(requests).view(-1, 1, 1) * branches
    table = (first + choice) * columns + torch.arange(columns)
    missing = torch.rand(table.shape) < rng.choice((0.0, 0.1, 1.0))
    return table.masked_fill(missing, -1).view(-1, columns).int()
