"""The products of a transformer's layers, ours against cuBLAS, by tokens.

    python bench/gemm.py [--candidates] [--shapes llada-8b] [--tokens 64 128 192 252]

For each product: microseconds a call and the share of the floor, which is the larger of the bytes (weight,
tokens, result) over the measured copy rate and the FLOP over the measured rate of a product. A call goes
through all layers' weights, so that none is found in the L2 cache. The lines "layers" are all products of all
layers one after another, which is what a forward has and what decides: kernels that win alone can lose there,
where the GPU is warm. Both sides take turns on the clock.

`gate_up` holds the activation on our side and does not on cuBLAS's; in "layers" cuBLAS's side has it too, as
a kernel of its own. Each product is compared with fp32 before it is timed: more than twice torch's error ends
the run with status 1.

With --candidates a line also holds the microseconds of every compiled tile that takes the product and of
cuBLAS, with everything that the operator adds on all sides (q and k rotated and the cache written behind qkv,
the activation behind gate_up), and lines "lm_head" those of the LM head's two ways. The fastest is `choice`;
`python bench/tuning_rows.py` makes the tables of `blockbatch_kernels.tuning` from them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from candidates import ROUNDING, layer_products, time_lm_head, time_product
from random_models import DTYPES, random_model
from timing import as_graph, ceilings, clean, device_of, event_ms, parser, rounded, write_report
from torch import Tensor
from verify import Wrong, relative_error

import blockbatch_kernels as bbk
from blockbatch_kernels import tuning

_TURNS = 5
_TOKENS, _QUICK_TOKENS = (8, 16, 32, 64, 96, 128, 160, 192, 224, 252), (64, 252)

Product = Callable[[Tensor, Tensor], Tensor]


def weights_of(model) -> dict[str, list[Tensor]]:
    """[out, in] of each layer, by product."""
    layers = model.weights.layers
    return {
        name: [getattr(layer, f"{name}_weight") for layer in layers]
        for name in ("qkv", "out", "gate_up", "down")
    }


def ours_of(name: str, backend: str | None) -> Product:
    product = bbk.linear_swiglu if name == "gate_up" else bbk.linear
    return partial(product, static_weight=True, backend=backend)


def check(name: str, x: Tensor, weight: Tensor, ours: Product) -> dict[str, float]:
    """Raises `Wrong` where ours errs by more than twice what torch does in the same dtype."""

    def with_torch(x: Tensor, weight: Tensor) -> Tensor:
        product = F.linear(x, weight)
        if name != "gate_up":
            return product
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up

    truth = with_torch(x.float(), weight.float())
    error, torchs = relative_error(ours(x, weight), truth), relative_error(with_torch(x, weight), truth)
    allowed = 2 * torchs + ROUNDING[x.dtype]
    if not error <= allowed:
        raise Wrong(f"{name}, {len(x)} tokens: expected an error of at most {allowed:.2e}, got {error:.2e}")
    return {"error": error, "torch_error": torchs}


def through(product: Product, x: Tensor, weights: list[Tensor]) -> Callable[[], None]:
    """The product with each weight; results are let go at once and take turns on the same memory."""

    def run() -> None:
        for weight in weights:
            product(x, weight)

    return run


def by_turns(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_TURNS):
        for name, run in runs.items():
            taken[name].append(event_ms(run, device, repeats))
    return {name: statistics.median(values) for name, values in taken.items()}


def floor_us(tokens: int, rows: int, columns: int, dtype: torch.dtype, limits: dict) -> float:
    moved = dtype.itemsize * (rows * columns + tokens * (columns + rows))
    flops = 2 * tokens * rows * columns
    return 1e6 * max(moved / limits["copy_gb_per_s"] / 1e9, flops / limits["matmul_tflops"] / 1e12)


def measure_lm_head(
    model, rows: int, device: torch.device, dtype: torch.dtype, limits: dict, options
) -> dict[str, Any]:
    vocabulary, columns = model.weights.lm_head.shape
    taken = time_lm_head(model, rows, device, dtype, options.repeats)
    # What is kept of the logits is small.
    floor = floor_us(rows, vocabulary, columns, dtype, limits)
    sizes = {"product": "lm_head", "tokens": rows, "rows": vocabulary, "columns": columns}
    return {**sizes, "floor_us": floor, "candidates": taken, "choice": min(taken, key=taken.get)}


def measure(
    model, tokens: int, device: torch.device, dtype: torch.dtype, limits: dict, options
) -> list[dict[str, Any]]:
    """A line a product, and one for all of them."""
    weights = weights_of(model)
    inputs = {
        name: torch.randn(tokens, every[0].shape[1], device=device).to(dtype)
        for name, every in weights.items()
    }
    ours = {name: ours_of(name, options.backend) for name in weights}
    operators = layer_products(model, tokens, dtype) if options.candidates else {}
    lines, floors = [], 0.0
    for name, every in weights.items():
        rows, columns = every[0].shape
        x, count = inputs[name], len(every)
        checks = check(name, x, every[0], ours[name])
        sides = {"cublas": F.linear, "ours": ours[name]}
        taken = by_turns(
            {side: as_graph(through(product, x, every), device) for side, product in sides.items()},
            device,
            options.repeats,
        )
        floor = floor_us(tokens, rows, columns, dtype, limits)
        floors += floor * count / 1e3
        gated = name == "gate_up"
        parts = tuning.linear_parts(tokens, rows // 2 if gated else rows, columns, gated=gated)
        lines.append(
            {
                "product": name,
                "tokens": tokens,
                "rows": rows,
                "columns": columns,
                "parts": [{"features": features, **tile._asdict()} for features, tile in parts],
                "floor_us": floor,
                **{f"{side}_us": 1e3 * value / count for side, value in taken.items()},
                **{f"{side}_percent_of_floor": 0.1 * floor * count / value for side, value in taken.items()},
                **checks,
            }
        )
        if options.candidates:
            taken = time_product(operators[name], tokens, device, dtype, options.repeats)
            lines[-1] |= {"candidates": taken, "choice": min(taken, key=taken.get)}

    def cublas_layers() -> None:
        for qkv, out, gate_up, down in zip(*weights.values(), strict=True):
            F.linear(inputs["qkv"], qkv)
            F.linear(inputs["out"], out)
            F.linear(bbk.swiglu(F.linear(inputs["gate_up"], gate_up), backend=options.backend), down)

    def our_layers() -> None:
        for qkv, out, gate_up, down in zip(*weights.values(), strict=True):
            ours["qkv"](inputs["qkv"], qkv)
            ours["out"](inputs["out"], out)
            ours["down"](ours["gate_up"](inputs["gate_up"], gate_up), down)

    taken = by_turns(
        {"cublas": as_graph(cublas_layers, device), "ours": as_graph(our_layers, device)},
        device,
        options.repeats,
    )
    lines.append(
        {
            "product": "layers",
            "tokens": tokens,
            "floor_ms": floors,
            **{f"{side}_ms": value for side, value in taken.items()},
            **{f"{side}_percent_of_floor": 100 * floors / value for side, value in taken.items()},
        }
    )
    return lines


def show(line: dict[str, Any]) -> str:
    unit = "ms" if line["product"] == "layers" else "us"
    text = f"{line['tokens']:4} tokens, {line['product']:8} floor {line[f'floor_{unit}']:.2f} {unit}"
    if f"ours_{unit}" in line:
        text += ": " + ", ".join(
            f"{side} {line[f'{side}_{unit}']:.2f} ({line[f'{side}_percent_of_floor']:.0f}%)"
            for side in ("cublas", "ours")
        )
    for name, taken in sorted(line.get("candidates", {}).items(), key=lambda item: item[1]):
        text += f"\n{'':20}{taken:8.2f} {name}"
    return text


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "gemm", ["llada-8b", "dream-7b"])
    arguments.add_argument("--candidates", action="store_true", help="also every tile, and the LM head")
    arguments.add_argument("--tokens", nargs="*", type=int, default=None)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    device, dtype = device_of(options), DTYPES[options.dtype]
    limits = ceilings(device, dtype)
    models, counts = {}, options.tokens or (_QUICK_TOKENS if options.quick else _TOKENS)
    for name in options.shapes:
        model = random_model(name, device, dtype)
        models[name] = []
        for tokens in counts:
            lines = measure(model, tokens, device, dtype, limits, options)
            if options.candidates:
                lines.append(measure_lm_head(model, tokens, device, dtype, limits, options))
            models[name] += map(rounded, lines)
            for line in lines:
                print(f"{name} {show(line)}", flush=True)
        del model
        clean(device)
    kind = tuning.device_kind(device)._asdict()
    write_report(options, device, device_kind=kind, ceilings=limits, models=models)


if __name__ == "__main__":
    main()
