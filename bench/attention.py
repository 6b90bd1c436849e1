"""The ways to compute attention beside each other, by pack: what `blockbatch_kernels.tuning` chooses between.

    python bench/attention.py [--shapes llada-8b dream-7b]

Ways: "units" (CUDA C++, a plan whose work is cut in equal stretches), "tiles" (CUDA C++, a plan of tiles) and
"triton". For each pack: microseconds of a layer and of the plan that is made once for all layers. All ways
take turns on the clock and walk through input sets larger than the L2 cache together. Each is compared with
fp32 before it is timed: more than twice torch's error ends the run with status 1. The fastest is `choice`;
`python bench/tuning_rows.py` makes the table of `blockbatch_kernels.tuning` from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from candidates import ROUNDING, forced
from op_cases import num_sets
from random_models import DTYPES, SHAPES
from timing import as_graph, clean, device_of, medians_in_turns, parser, rounded, write_report
from torch import Tensor
from verify import Wrong, relative_error

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models.spec import ModelSpec
from blockbatch_kernels import tuning

_WINDOWS = (4, 8, 16, 32, 64, 128)
_WAYS = {"units": "cuda", "tiles": "cuda", "triton": "triton"}
_CALLS = 20
# Queries of each row, keys of each row, and how many of them at the front lie on pages that all rows share.
CASES = (
    (_WINDOWS, 1280, 1024),
    (_WINDOWS, 1280, 1280),
    (_WINDOWS, 1280, 0),
    (_WINDOWS, 512, 256),
    (_WINDOWS, 512, 0),
    (_WINDOWS, 4352, 4096),
    (_WINDOWS, 4352, 0),
    ((32, 64, 128), 1280, 0),
    ((64, 128), 1280, 0),
    ((8,), 1280, 0),
    ((128,), 1280, 0),
    ((256,), 1280, 0),
    ((4, 4, 8, 16), 4096, 0),
    ((1280,), 1280, 0),
    ((1280,) * 2, 1280, 0),
    ((1280,) * 3, 1280, 0),
    ((1280,) * 6, 1280, 0),
    ((4096,), 4096, 0),
)
_SMALL_CASES = (((4, 8), 64, 32), ((4, 8), 64, 0), ((64,), 64, 0))


def name_of(queries: tuple[int, ...], keys: int, shared: int) -> str:
    equal = len(queries) > 1 and len(set(queries)) == 1
    packed = f"{len(queries)} x {queries[0]}" if equal else "+".join(map(str, queries))
    return f"{packed} queries, {keys} keys, {shared} shared"


class Inputs:
    """Queries, caches and page table of a case, in several sets."""

    def __init__(
        self,
        spec: ModelSpec,
        queries: tuple[int, ...],
        keys: int,
        shared: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.queries, self.keys, self.rows = queries, keys, len(queries)
        self.heads = spec.num_heads, spec.num_kv_heads
        self.tokens = sum(queries)
        columns, common = -(-keys // PAGE_SIZE), shared // PAGE_SIZE
        pages = common + self.rows * (columns - common)
        order = torch.randperm(pages, device=device).int()
        own = order[common:].view(self.rows, -1)
        self.table = torch.cat((order[:common].expand(self.rows, -1), own), dim=1).contiguous()
        self.distinct_rows = 1 if shared else self.rows
        self.bounds = torch.tensor([0, *queries]).cumsum(0).int().to(device)
        self.seqlens = torch.full((self.rows,), keys, dtype=torch.int32, device=device)
        cache = 2, pages, PAGE_SIZE, spec.num_kv_heads, spec.head_dim
        self.sets = num_sets(
            2 * pages * PAGE_SIZE * spec.num_kv_heads * spec.head_dim * dtype.itemsize, device
        )
        self.q = [
            torch.randn(self.tokens, spec.num_heads, spec.head_dim, device=device).to(dtype)
            for _ in range(self.sets)
        ]
        self.caches = torch.randn(self.sets, *cache, device=device, dtype=dtype)

    def plan(self, backend: str) -> bbk.AttentionPlan:
        return bbk.attention_plan(
            self.table,
            self.bounds,
            self.seqlens,
            page_size=PAGE_SIZE,
            num_tokens=self.tokens,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            distinct_rows=self.distinct_rows,
            backend=backend,
        )

    def attend(self, index: int, plan: bbk.AttentionPlan | None, backend: str) -> Tensor:
        tensors = self.q[index], *self.caches[index], self.table, self.bounds, self.seqlens
        return bbk.varlen_attention(*tensors, plan=plan, backend=backend)

    def by_torch(self, dtype: torch.dtype) -> Tensor:
        """The first set row by row, in `dtype`."""
        out, (k, v) = [], self.caches[0]
        for query, row in zip(self.q[0].split(self.queries), self.table, strict=True):
            q, keys, values = (
                tensor.to(dtype).transpose(0, 1)[None]
                for tensor in (query, *(cache[row.long()].flatten(0, 1)[: self.keys] for cache in (k, v)))
            )
            out.append(F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(out)


def repeated(call: Callable[[int], Any], sets: int) -> Callable[[], None]:
    def run() -> None:
        for index in range(_CALLS):
            call(index % sets)

    return run


def ways_on(device: torch.device) -> list[str]:
    """The ways that run there; on a CPU the reference stands in for all."""
    if device.type != "cuda" or tuning.device_kind(device).capability == (9, 0):
        return list(_WAYS)
    return [way for way in _WAYS if way != "units"]


def measure(
    inputs: Inputs, name: str, device: torch.device, dtype: torch.dtype, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of the attention and of its plan, by way."""
    on_gpu = device.type == "cuda"
    truth = inputs.by_torch(torch.float32)
    allowed = 2 * relative_error(inputs.by_torch(dtype), truth) + ROUNDING[dtype]
    attending, planning, kept = {}, {}, []
    for way in ways_on(device):
        backend, plan = _WAYS[way] if on_gpu else "reference", None

        def make_plan(backend: str = backend) -> bbk.AttentionPlan:
            return inputs.plan(backend)

        if backend == "cuda":
            with forced("plans_units", way == "units", device):
                plan, planning[way] = make_plan(), as_graph(repeated(lambda _: make_plan(), 1), device)
            if (plan.units.shape[0] > 0) != (way == "units"):
                raise Wrong(f"{name}, {way}: the plan has {plan.units.shape[0]} units")
        else:
            plan, planning[way] = make_plan(), as_graph(repeated(lambda _: make_plan(), 1), device)
        kept.append(plan)

        def attend(index: int, plan: bbk.AttentionPlan = plan, backend: str = backend) -> Tensor:
            return inputs.attend(index, plan, backend)

        error = relative_error(attend(0), truth)
        if not error <= allowed:
            raise Wrong(f"{name}, {way}: expected an error of at most {allowed:.2e}, got {error:.2e}")
        attending[way] = as_graph(repeated(attend, inputs.sets), device)

    def microseconds(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
        taken = medians_in_turns([(run, None) for run in runs.values()], device, repeats)
        return {way: 1e3 * value / _CALLS for way, value in zip(runs, taken, strict=True)}

    return microseconds(attending), microseconds(planning)


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "attention", ["llada-8b", "dream-7b"])
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    device, dtype = device_of(options), DTYPES[options.dtype]
    models: dict[str, list[dict[str, Any]]] = {}
    for model in options.shapes:
        spec, models[model] = SHAPES[model], []
        for queries, keys, shared in _SMALL_CASES if model.startswith("small") else CASES:
            name = name_of(queries, keys, shared)
            inputs = Inputs(spec, queries, keys, shared, device, dtype)
            ways, plans = measure(inputs, name, device, dtype, 3 if options.quick else options.repeats)
            line = {
                "case": name,
                "tokens": inputs.tokens,
                "keys": keys,
                "distinct_rows": inputs.distinct_rows,
                "num_heads": spec.num_heads,
                "num_kv_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "page_size": PAGE_SIZE,
                "candidates": ways,
                "plan_us": plans,
                "choice": min(ways, key=ways.get),
            }
            models[model].append(rounded(line))
            times = ", ".join(f"{way} {taken:.1f} (plan {plans[way]:.1f})" for way, taken in ways.items())
            print(f"{model} {name}: {times}", flush=True)
            del inputs
            clean(device)
    write_report(options, device, device_kind=tuning.device_kind(device)._asdict(), models=models)


if __name__ == "__main__":
    main()
