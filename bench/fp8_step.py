"""Products in e4m3 and block steps with layers in e4m3, beside bf16, in the shape of LLaDA-8B on a GPU.

    python bench/fp8_step.py [--shapes llada-8b] [--tokens 32 128 252 1280] [--kv-dtype fp8] [--quick]

Everything is verified before it is timed: products against the reference operator, steps by verify.py. All
layers' products of a kind run in one CUDA graph, so that every weight comes from memory. Columns of a
product, in ms for all layers:

    ours          the default of `bbk.linear_fp8`
    triton        its Triton version
    library       `torch._scaled_mm` with a scale for each row
    library_fast  the same with the tensor cores' own sums (use_fast_accum), which keep fewer bits
    one_scale     `torch._scaled_mm` with one scale for each tensor (not what a model computes: a yardstick)
    bf16          `bbk.linear` on weights in bf16

fp8_tiles.py compares the tiles of the extension's kernel.

A step is one of bench/step_latency.py; `row_ms` is a forward of a whole row of 1280 positions. Columns of a
step: `bf16` and `fp8` say the kind of the weights, `bf16_apart` and `fp8_apart` compute q, k and v by two
launches instead of one (rotated.py; `rotated` has that product alone), and with --kv-dtype fp8 `bf16_kv8` and
`fp8_kv8` have a K/V cache in e4m3.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from contextlib import nullcontext

import rotated
import step_latency
import torch
from random_models import DTYPES, quantized, random_model, with_kv_in_e4m3
from timing import as_graph, clean, device_of, event_ms, in_turns, parser, rounded, target, write_report
from torch import Tensor
from verify import Wrong, check_step, relative_error

import blockbatch_kernels as bbk
from blockbatch.models import Model
from blockbatch.models.quantized_weights import QuantizedWeight

FIELDS = ("qkv_weight", "out_weight", "gate_up_weight", "down_weight")
TOKENS = (32, 128, 252, 1280)
LENGTH = 1280
# A sum rounded to bf16, and what tensor cores leave out of one.
MOST_ERROR = 5e-3
# What is to be reached: ms of a step of so many tokens, and of a whole row.
LIMITS = {128: 3.9, 252: 5.0}
ROW_LIMIT = 18.0
# Ends the kind of a step whose product of q, k and v is apart from what follows it.
APART = "_apart"
PARTS = ("products", "rows", "rotated", "steps", "row")

Product = Callable[[Tensor, Tensor, QuantizedWeight, Tensor], Tensor]


def by_backend(backend: str | None) -> Product:
    options = dict(out_dtype=torch.bfloat16, static_weight=True, backend=backend)
    return lambda x, scale, weight, _: bbk.linear_fp8(x, scale, weight.values, weight.scale, **options)


def by_library(x: Tensor, scale: Tensor, weight: QuantizedWeight, _: Tensor) -> Tensor:
    scales = scale[:, None], weight.scale[None, :]
    return torch._scaled_mm(x, weight.values.t(), *scales, out_dtype=torch.bfloat16)


def by_library_added_fast(x: Tensor, scale: Tensor, weight: QuantizedWeight, _: Tensor) -> Tensor:
    scales = scale[:, None], weight.scale[None, :]
    options = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch._scaled_mm(x, weight.values.t(), *scales, **options)


def by_library_with_one_scale(x: Tensor, _: Tensor, weight: QuantizedWeight, one: Tensor) -> Tensor:
    return torch._scaled_mm(x, weight.values.t(), one, one, out_dtype=torch.bfloat16)


def in_bf16(x: Tensor, _: None, weight: Tensor, __: Tensor) -> Tensor:
    return bbk.linear(x, weight, static_weight=True)


def for_all(product: Product, rows: tuple, weights: list, one: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [product(*rows, weight, one) for weight in weights]


def ways(device: torch.device) -> dict[str, Product]:
    found: dict[str, Product] = {"ours": by_backend(None)}
    if device.type != "cuda":
        return found
    found |= {"triton": by_backend("triton"), "library": by_library}
    found |= {"library_fast": by_library_added_fast, "one_scale": by_library_with_one_scale}
    return found


def measure_products(model: Model, plain: Model, tokens: int, repeats: int) -> list[dict]:
    """A line for each of the four weights."""
    lines, device = [], model.device
    one = torch.ones((), device=device)
    for field in FIELDS:
        weights = [getattr(layer, field) for layer in model.weights.layers]
        exact = [getattr(layer, field) for layer in plain.weights.layers]
        rows, columns = weights[0].shape
        activations = torch.randn(tokens, columns, device=device).to(model.dtype)
        x, scale = bbk.quantize_rows(activations)
        first = (x, scale, weights[0].values, weights[0].scale)
        want = bbk.linear_fp8(*first, out_dtype=torch.float32, backend="reference")
        line = {"product": field, "tokens": tokens, "out_features": rows, "in_features": columns}
        runs, failed = {}, {}
        for name, product in ways(device).items():
            try:
                error = relative_error(product(x, scale, weights[0], one), want)
                if name not in ("one_scale", "library_fast") and not error <= MOST_ERROR:
                    raise Wrong(f"{field} by {name}, {tokens} tokens: error {error:.2e}")
                if name == "library_fast":
                    line["library_fast_error"] = error
                runs[name] = as_graph(for_all(product, (x, scale), weights, one), device)
            except (RuntimeError, ValueError, Wrong) as caught:
                if name == "ours":
                    raise
                failed[name] = str(caught)[:300]
        runs["bf16"] = as_graph(for_all(in_bf16, (activations, None), exact, one), device)
        taken = in_turns([(run, None) for run in runs.values()], device, repeats)
        line["ms"] = {name: ms for name, (ms, _) in zip(runs, taken, strict=True)}
        line["gb_per_s"] = sum(weight.nbytes for weight in weights) / line["ms"]["ours"] / 1e6
        if failed:
            line["failed"] = failed
        lines.append(rounded(line))
        print(lines[-1], flush=True)
        del runs
        clean(device)
    return lines


def measure_rows(model: Model, tokens: int, repeats: int) -> dict:
    """ms of what quantises, for all layers, beside what it replaces."""
    spec, layers = model.spec, model.spec.num_layers

    def make(columns: int) -> Tensor:
        return torch.randn(tokens, columns, device=model.device).to(model.dtype)

    x, residual, gate_up = make(spec.hidden_size), make(spec.hidden_size), make(2 * spec.intermediate_size)
    weight, activated = torch.ones_like(x[0]), gate_up[:, : spec.intermediate_size].contiguous()
    options = dict(eps=spec.rms_norm_eps, residual=residual)
    calls = {
        "rms_norm": lambda backend: bbk.rms_norm(x, weight, **options, backend=backend),
        "rms_norm_fp8": lambda backend: bbk.rms_norm_fp8(x, weight, **options, backend=backend),
        "quantize_rows": lambda backend: bbk.quantize_rows(x, backend=backend),
        "swiglu": lambda backend: bbk.swiglu(gate_up, backend=backend),
        "swiglu_fp8": lambda backend: bbk.swiglu_fp8(gate_up, backend=backend),
        "quantize_rows of the activation": lambda backend: bbk.quantize_rows(activated, backend=backend),
    }
    runs = {}
    for name, call in calls.items():
        for backend in ("cuda", "triton") if model.device.type == "cuda" else ("reference",):
            run = as_graph(
                lambda call=call, backend=backend: [call(backend) for _ in range(layers)], model.device
            )
            runs[f"{name} {backend}"] = run
    taken = in_turns([(run, None) for run in runs.values()], model.device, repeats)
    found = {"tokens": tokens, "ms": {name: ms for name, (ms, _) in zip(runs, taken, strict=True)}}
    print(rounded(found), flush=True)
    return rounded(found)


def measure_step(models: dict[str, Model], tokens: int, length: int, repeats: int) -> list[dict]:
    """The same step by the models of all kinds, in turns."""
    lines = []
    several = len(step_latency.BLOCK_SIZES[tokens]) > 1
    for pages in ("shared", "separate") if several else ("separate",):
        cases, checks = {}, {}
        for kind, model in models.items():
            with rotated.apart() if kind.endswith(APART) else nullcontext():  # a graph keeps what it captured
                cases[kind] = step_latency.make_case(model, tokens, length, pages)
                checks[kind] = check_step(cases[kind])
        taken = in_turns([(case.run, case.restore) for case in cases.values()], model.device, repeats)
        line = {"tokens": tokens, "length": length, "pages": pages, "checks": checks}
        line |= {f"{kind}_ms": ms for kind, (ms, _) in zip(cases, taken, strict=True)}
        lines.append(rounded(line))
        shown = ", ".join(f"{kind} {lines[-1][f'{kind}_ms']:.3f} ms" for kind in cases)
        print(f"step of {tokens} tokens, {pages} pages: {shown}", flush=True)
        del cases
        clean(model.device)
    return lines


def measure_row(models: dict[str, Model], length: int, repeats: int) -> dict:
    """A forward of one whole row without a cache, launch by launch."""
    line = {"length": length}
    for kind, model in models.items():
        ids = torch.arange(length, device=model.device)[None] % 1000
        theirs = Model(model.spec, model.weights, None, backend="reference").hidden_states(ids)
        with rotated.apart() if kind.endswith(APART) else nullcontext():
            hidden = model.hidden_states(ids)
            line[f"{kind}_difference_from_reference"] = relative_error(hidden, theirs)
            run = functools.partial(model.hidden_states, ids)
            line[f"{kind}_ms"] = event_ms(run, model.device, repeats)
    print(rounded(line), flush=True)
    return rounded(line)


@torch.inference_mode()
def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__, "fp8_step", ["llada-8b"])
    arguments.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    arguments.add_argument("--length", type=int, default=LENGTH)
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--kv-dtype", choices=("fp8",), help="steps with a K/V cache in e4m3, too")
    arguments.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = arguments.parse_args()
    device, repeats = device_of(options), 3 if options.quick else options.repeats
    report = []
    for shape in options.shapes:
        plain = random_model(shape, device, DTYPES[options.dtype], backend=options.backend)
        models = {"bf16": plain, "fp8": quantized(plain)}
        steps = models | {kind + APART: model for kind, model in models.items()}
        if options.kv_dtype == "fp8":
            steps |= {f"{kind}_kv8": with_kv_in_e4m3(model) for kind, model in models.items()}
        found = {"model": shape, "products": [], "rows": [], "rotated": [], "steps": []}
        for tokens in options.tokens:
            if "products" in options.only:
                found["products"] += measure_products(models["fp8"], plain, tokens, repeats)
            if "rows" in options.only:
                found["rows"].append(measure_rows(models["fp8"], tokens, repeats))
            if "rotated" in options.only:
                found["rotated"].append(rotated.measure_rotated(models, tokens, repeats))
            if "steps" in options.only and tokens in step_latency.BLOCK_SIZES and tokens <= 512:
                found["steps"] += measure_step(steps, tokens, options.length, repeats)
        if "row" in options.only:
            rows = models | {f"fp8{APART}": models["fp8"]}
            found["row"] = measure_row(rows, options.length, repeats)
        report.append(found)
    targets = []
    for line in report[0]["steps"] if options.shapes[0] == "llada-8b" else ():
        if line["tokens"] in LIMITS and (line["pages"] == "shared" or line["tokens"] == 128):
            limit = LIMITS[line["tokens"]]
            targets.append(target(f"step of {line['tokens']} tokens, ms", line["fp8_ms"], limit))
    if options.shapes[0] == "llada-8b" and options.length == LENGTH and "row" in report[0]:
        targets.append(target("a whole row of 1280, ms", report[0]["row"]["fp8_ms"], ROW_LIMIT))
    write_report(options, device, targets=targets, shapes=report)


if __name__ == "__main__":
    main()
