"""Attention over a K/V cache in e4m3 beside the same in 16 bits, by pack.

    python bench/attention_fp8.py [--shapes llada-8b dream-7b]

The packs are those of bench/attention.py. Ways: "units", "tiles" and "triton" over e4m3, and "16 bits": what
the default computes over a cache of the same numbers in the model's dtype. Each is compared with fp32 before
it is timed: more than twice torch's error ends the run with status 1. Also the cache write behind the
rotation (`write`), in e4m3 and in 16 bits. Microseconds of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from attention import _CALLS, _SMALL_CASES, _WAYS, CASES, Inputs, name_of, repeated, ways_on
from candidates import ROUNDING, forced
from random_models import DTYPES, SHAPES
from timing import as_graph, clean, device_of, medians_in_turns, parser, rounded, write_report
from torch import Tensor
from verify import Wrong, relative_error

import blockbatch_kernels as bbk
from blockbatch_kernels.shapes import E4M3

_QUICK = CASES[:4]
# Of numbers from a normal distribution: the largest of a cache are about 2^7 of what is stored.
_SCALE = 2.0**-5


class Packs:
    """Inputs of a case with two caches of the same numbers."""

    def __init__(self, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> None:
        self.inputs, kv_heads = inputs, inputs.heads[1]
        self.scales = (torch.full((kv_heads,), _SCALE, device=device),) * 2
        self.caches = torch.empty(inputs.caches.shape, dtype=E4M3, device=device)
        for stored, exact in zip(self.caches, inputs.caches, strict=True):
            stored.copy_((exact.float() / _SCALE).to(E4M3))
            exact.copy_(stored.float() * _SCALE)  # the same numbers

    def attend(self, index: int, plan: bbk.AttentionPlan | None, backend: str) -> Tensor:
        inputs = self.inputs
        tensors = inputs.q[index], *self.caches[index], *self.scales
        where = inputs.table, inputs.bounds, inputs.seqlens
        return bbk.varlen_attention_fp8(*tensors, *where, plan=plan, backend=backend)

    def write(self, index: int, in_e4m3: bool) -> None:
        """Positions and slots of the last keys of the first row: as many as there are tokens."""
        inputs = self.inputs
        tokens, kv_heads, head_dim = inputs.tokens, inputs.heads[1], inputs.q[0].shape[2]
        if not hasattr(self, "written"):
            device = inputs.q[0].device
            angles = torch.rand(tokens, head_dim // 2, device=device)
            heads = torch.randn(tokens, kv_heads, head_dim, device=device).to(inputs.q[0].dtype)
            positions = torch.arange(tokens, device=device)
            self.written = heads, heads.clone(), positions.int(), positions, angles.cos(), angles.sin()
            self.query = inputs.q[0].clone()
        if in_e4m3:
            bbk.rope_kv_write_fp8(self.query, *self.written, *self.caches[index], *self.scales)
        else:
            bbk.rope_kv_write(self.query, *self.written, *self.inputs.caches[index])


def measure(packs: Packs, name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> dict:
    """Microseconds by way."""
    inputs, runs, kept = packs.inputs, {}, []
    truth = inputs.by_torch(torch.float32)
    allowed = 2 * relative_error(inputs.by_torch(dtype), truth) + ROUNDING[dtype]

    def add(way: str, attend: Callable[[int], Tensor]) -> None:
        error = relative_error(attend(0), truth)
        if not error <= allowed:
            raise Wrong(f"{name}, {way}: expected an error of at most {allowed:.2e}, got {error:.2e}")
        runs[way] = as_graph(repeated(attend, inputs.sets), device)

    for way in ways_on(device):
        backend = _WAYS[way] if device.type == "cuda" else "reference"
        # Only the plan of CUDA C++ knows two kinds.
        with forced("plans_units", way == "units", device) if backend == "cuda" else nullcontext():
            plan = inputs.plan(backend)
        kept.append(plan)
        add(way, lambda index, plan=plan, backend=backend: packs.attend(index, plan, backend))
    default = bbk.backend_of("attention_plan", device)
    plan = inputs.plan(default)
    add("16 bits", lambda index: inputs.attend(index, plan, None))
    if packs.caches.shape[2] * packs.caches.shape[3] >= inputs.tokens:
        runs["write"] = as_graph(repeated(lambda index: packs.write(index, True), inputs.sets), device)
        runs["write 16 bits"] = as_graph(
            repeated(lambda index: packs.write(index, False), inputs.sets), device
        )
    taken = medians_in_turns([(run, None) for run in runs.values()], device, repeats)
    return {way: 1e3 * value / _CALLS for way, value in zip(runs, taken, strict=True)}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "attention_fp8", ["llada-8b", "dream-7b"])
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    device, dtype = device_of(options), DTYPES[options.dtype]
    models: dict[str, list[dict]] = {}
    for model in options.shapes:
        spec, models[model] = SHAPES[model], []
        cases = _SMALL_CASES if model.startswith("small") else _QUICK if options.quick else CASES
        for queries, keys, shared in cases:
            name = name_of(queries, keys, shared)
            inputs = Inputs(spec, queries, keys, shared, device, dtype)
            packs = Packs(inputs, device, dtype)
            us = measure(packs, name, device, dtype, 3 if options.quick else options.repeats)
            sizes = {"tokens": inputs.tokens, "keys": keys, "distinct_rows": inputs.distinct_rows}
            models[model].append(rounded({"case": name, **sizes, "us": us}))
            times = ", ".join(f"{way} {taken:.1f}" for way, taken in us.items())
            print(f"{model} {name}: {times}", flush=True)
            del inputs, packs
            clean(device)
    write_report(options, device, models=models)


if __name__ == "__main__":
    main()
