"""Latency of a block step against packed tokens and canvas length, in the shapes of LLaDA-8B and Dream-7B.

    python bench/step_latency.py [--shapes llada-8b dream-7b] [--tokens 8 252 ...] [--lengths 1280 ...]

One line for every model, number of packed tokens, canvas length and kind of pages ("shared": all branches use
the same pages outside their windows, as after a full forward; "separate": every branch has its own). On it:

    ours_ms         the engine's step (a CUDA graph on a GPU), median by events; the better of two repeats
    parts_ms        the same step by part, from the profiler's times of its kernels (the fastest of three)
    host_ms         clock time of a step in a decode beyond its time on the device: launch, wait, Python; the
                    better of two repeats
    products_ms     the step's matrix products alone, by cuBLAS, in a CUDA graph on the same weights,
                    in turns with ours
    floor_ms        bytes and FLOP that the step needs at least, by the ceilings measured in the same run
    eager_ms        the same step in plain torch, launched operator by operator (see eager.py)

A line is measured after its step passed the checks of verify.py; one that fails ends the run with status 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import parts
import products
import torch
from cases import StepCase
from eager import EagerModel
from random_models import DTYPES, product_bytes, random_model, step_flops
from timing import (
    ceilings,
    clean,
    device_of,
    in_turns,
    parser,
    rounded,
    synchronize,
    target,
    wall_ms,
    write_report,
)
from verify import check_eager, check_step

from blockbatch.models import Model

# Block sizes that give a number of packed tokens; beyond 252 all windows are whole generation regions.
BLOCK_SIZES = {
    8: (8,),
    12: (4, 8),
    16: (16,),
    32: (32,),
    64: (64,),
    128: (128,),
    192: (64, 128),
    252: (4, 8, 16, 32, 64, 128),
    512: (256,) * 2,
    1024: (256,) * 4,
    2048: (256,) * 8,
    4096: (256,) * 16,
}
TOKENS = tuple(count for count in BLOCK_SIZES if count != 12)
LENGTHS = (512, 1280, 2304, 4096)
# Every number of tokens is measured at this length, these numbers at every length.
MAIN_LENGTH, MAIN_TOKENS = 1280, (32, 252, 1024)
# Steps of several rows that are also measured on shared pages.
BOTH_PAGES = (12, 192, 252)
QUICK = ((252, 1280), (32, 1280))


def grid(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(packed tokens, canvas length) of every line."""
    if options.quick:
        return list(QUICK)
    if options.tokens or options.lengths:
        tokens, lengths = options.tokens or TOKENS, options.lengths or LENGTHS
        return [(count, length) for length in lengths for count in tokens]
    return [
        (count, length)
        for length in LENGTHS
        for count in TOKENS
        if length == MAIN_LENGTH or count in MAIN_TOKENS
    ]


def host_ms(case: StepCase, steps: int) -> float | None:
    """Median clock time of a step in a decode beyond its time on the device; None without graphs."""
    if case.graphs is None:
        return None
    case.restore()
    case.session.step()
    synchronize(case.model.device)
    case.graphs.spans = []
    clock = [time.perf_counter()]
    for _ in range(steps):
        case.session.step()
        clock.append(time.perf_counter())
    spans, case.graphs.spans = case.graphs.spans, None
    case.restore()
    return statistics.median(
        1e3 * (end - begin) - span[0].elapsed_time(span[1])
        for begin, end, span in zip(clock, clock[1:], spans, strict=False)
    )


def better_host_ms(case: StepCase, steps: int) -> float | None:
    repeats = [host_ms(case, steps) for _ in range(2)]
    return None if None in repeats else min(repeats)


def eager_ms(case: StepCase) -> float:
    """Clock time of the step in plain torch, from the same state."""
    gen_length = case.batch.state.gen_length
    eager = StepCase(
        EagerModel(case.model), case.method.block_sizes, case.canvas_length - gen_length, gen_length
    )
    check_eager(case, eager)
    return wall_ms(eager.run_and_wait, case.model.device, 3, eager.restore)


def make_case(model: Model, tokens: int, length: int, pages: str) -> StepCase:
    gen_length = min(256, length // 2)
    case = StepCase(
        model, BLOCK_SIZES[tokens], length - gen_length, gen_length, separate_pages=pages == "separate"
    )
    if case.tokens != tokens:
        raise SystemExit(f"expected a step of {tokens} packed tokens, got {case.tokens}")
    case.run()  # the first run of a size captures it
    return case


def measure(
    model: Model,
    tokens: int,
    length: int,
    pages: str,
    *,
    limits: dict[str, float],
    alone: Callable[[], Any],
    reference_error: float | None,
    repeats: int,
) -> dict:
    begun = time.perf_counter()
    case, device = make_case(model, tokens, length, pages), model.device
    checks = check_step(case, reference_error)

    (ours, spread), (alone_ms, alone_spread) = in_turns(
        [(case.run, case.restore), (alone, None)], device, repeats
    )
    line = {
        "model": model.name,
        "tokens": tokens,
        "length": length,
        "pages": pages,
        "branches": list(BLOCK_SIZES[tokens]),
        "predictions": case.predictions,
        "ours_ms": ours,
        "ours_spread": spread,
        "host_ms": better_host_ms(case, 3 if tokens > 252 else 12),
        "products_ms": alone_ms,
        "products_spread": alone_spread,
        "over_products": ours / alone_ms,
    }
    needed_bytes = product_bytes(model.weights) + case.distinct_page_bytes()
    needed_flops = step_flops(model.spec, tokens, case.predictions, length)
    line["floor_bytes_ms"] = needed_bytes / limits["copy_gb_per_s"] / 1e6
    line["floor_flop_ms"] = needed_flops / limits["matmul_tflops"] / 1e9
    line["floor_ms"] = max(line["floor_bytes_ms"], line["floor_flop_ms"])
    line["eager_ms"] = eager_ms(case)
    line["checks"] = checks
    line["seconds"] = time.perf_counter() - begun
    return line


def add_parts(model: Model, line: dict) -> None:
    """Adds the time of each part of the line's step."""
    case = make_case(model, line["tokens"], line["length"], line["pages"])
    kernels = parts.record(case.run, model.device, case.restore)
    line["parts_ms"] = rounded(parts.split(kernels, model.spec.num_layers))
    line["launches"] = len(kernels)
    if (line["tokens"], line["length"]) in QUICK:
        line["kernels"] = parts.by_name(kernels)


def show(line: dict) -> str:
    return (
        f"{name_of(line)} ours {line['ours_ms']:8.3f} ms (+-{line['ours_spread']:.1%}),"
        f" host +{line['host_ms'] or 0.0:.3f}, products {line['products_ms']:8.3f},"
        f" floor {line['floor_ms']:8.3f}, eager {line['eager_ms']:8.1f} ({line['seconds']:.1f} s)"
    )


def name_of(line: dict) -> str:
    return f"{line['model']:11} {line['tokens']:5} tokens, L {line['length']:5}, {line['pages']:8}"


def targets(lines: list[dict]) -> list[dict]:
    """The step that this package is made for beside what it is to reach, as far as it was measured."""
    found = []
    for line in lines:
        measured = line["model"], line["tokens"], line["length"]
        if measured != ("llada-8b", 252, 1280) or "parts_ms" not in line:
            continue
        step, parts_ms = f"252 tokens, 1280 positions, {line['pages']} pages", line["parts_ms"]
        attention = 0.7 if line["pages"] == "shared" else 1.5
        around = parts_ms["around_the_model"] + (line["host_ms"] or 0.0)
        found += [
            target(f"{step}: ms", line["ours_ms"], 8.0),
            target(f"{step}: times its products", line["over_products"], 1.15),
            target(f"{step}: attention, ms", parts_ms["attention"], attention),
            target(f"{step}: around the model, ms", around, 0.15),
        ]
    return found


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "step_latency", ["llada-8b", "dream-7b"])
    arguments.add_argument("--tokens", nargs="*", type=int, choices=BLOCK_SIZES)
    arguments.add_argument("--lengths", nargs="*", type=int)
    arguments.add_argument("--repeats", type=int, default=9)
    options = arguments.parse_args()
    device = device_of(options)
    limits = ceilings(device, DTYPES[options.dtype])
    print(limits, flush=True)
    begun, lines = time.perf_counter(), []
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        alone: dict[int, Callable[[], Any]] = {}
        reference_error = None
        for tokens, length in grid(options):
            repeats = options.repeats if tokens <= 512 else 3
            if tokens not in alone:
                alone[tokens] = products.products(model, tokens, tokens)
            for pages in ("shared", "separate") if tokens in BOTH_PAGES else ("separate",):
                line = measure(
                    model,
                    tokens,
                    length,
                    pages,
                    limits=limits,
                    alone=alone[tokens],
                    reference_error=reference_error,
                    repeats=repeats,
                )
                reference_error = line["checks"].get("reference_hidden_error", reference_error)
                lines.append(rounded(line))
                print(show(line), flush=True)
                clean(device)
        del model, alone
    parts.add_to_lines(options, device, lines, add_parts, name_of)
    write_report(
        options,
        device,
        seconds=round(time.perf_counter() - begun, 1),
        ceilings=limits,
        targets=targets(lines),
        lines=lines,
    )


if __name__ == "__main__":
    main()
