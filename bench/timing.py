"""Timing on a GPU by events, on a CPU by the clock; graphs; the machine's two ceilings; reports."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import DTYPES

from blockbatch.environment import describe

RESULTS = Path(__file__).parent / "results"

Run = Callable[[], Any]
# What is timed, and what runs ahead of it each time, outside the measured span.
Timed = tuple[Run, Run | None]


def event_ms(run: Run, device: torch.device, repeats: int, before: Run | None = None) -> float:
    """Median milliseconds of `run` on the device; `before` runs outside the measured span each time."""
    return medians_in_turns([(run, before)], device, repeats)[0]


def medians_in_turns(runs: list[Timed], device: torch.device, repeats: int) -> list[float]:
    """`event_ms` of several, one after the other in every repeat, so that all meet the same clocks."""
    if device.type != "cuda":
        walls = [[wall_ms(run, device, 1, before) for run, before in runs] for _ in range(repeats)]
        return [statistics.median(taken) for taken in zip(*walls, strict=True)]
    spans = []
    for _ in range(repeats):
        for run, before in runs:
            if before is not None:
                before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            spans.append((start, end))
    torch.cuda.synchronize(device)
    taken = [start.elapsed_time(end) for start, end in spans]
    return [statistics.median(taken[at :: len(runs)]) for at in range(len(runs))]


def wall_ms(run: Run, device: torch.device, repeats: int, before: Run | None = None) -> float:
    """Median milliseconds on the host's clock, from an idle device to an idle device."""
    spans = []
    for _ in range(repeats):
        if before is not None:
            before()
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        spans.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(spans)


def in_turns(runs: list[Timed], device: torch.device, repeats: int) -> list[tuple[float, float]]:
    """For each the smaller of two `medians_in_turns`, and how far the two lie apart as a share of it."""
    first, second = (medians_in_turns(runs, device, repeats) for _ in range(2))
    return [(min(pair), abs(pair[0] - pair[1]) / min(pair)) for pair in zip(first, second, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_graph(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` as a CUDA graph, after one call; on a CPU `run` itself."""
    run()
    if device.type != "cuda":
        return run
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> None:
        graph.replay()

    replay.kept = run, kept  # the graph holds addresses alone
    return replay


def clean(device: torch.device) -> None:
    """Gives the memory of what is no longer used back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches at best, measured: a copy (bytes read and written) and a square product."""
    on_gpu = device.type == "cuda"
    size, side = (2**31, 8192) if on_gpu else (2**24, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = min(event_ms(lambda: target.copy_(source), device, 10) for _ in range(2))
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    product = min(event_ms(lambda: torch.mm(a, b, out=out), device, 10) for _ in range(2))
    return {
        "copy_gb_per_s": round(2 * size / copy / 1e6, 1),
        "matmul_tflops": round(2 * side**3 / product / 1e9, 1),
        "matmul_side": side,
    }


def parser(description: str, result: str, shapes: list[str]) -> argparse.ArgumentParser:
    """The options that every benchmark of this kind takes."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.add_argument("--device", default=default)
    arguments.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments.add_argument("--backend", choices=("reference", "triton", "cuda"), default=None)
    arguments.add_argument("--shapes", nargs="*", default=shapes, help="see random_models.py")
    arguments.add_argument("--quick", action="store_true", help="the lines that have a target, fewer repeats")
    arguments.add_argument("--out", type=Path, default=RESULTS / f"{result}.json")
    return arguments


def device_of(options: argparse.Namespace) -> torch.device:
    device = torch.device(options.device)
    return torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else device


def write_report(options: argparse.Namespace, device: torch.device, **results: Any) -> None:
    """The JSON file of a benchmark: how it was run, on what, and what came out."""
    arguments = sys.argv[1:]
    if "--out" in arguments:  # where a run put its file says nothing about the run
        at = arguments.index("--out")
        del arguments[at : at + 2]
    report = {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *arguments]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dtype": options.dtype,
        "backend": options.backend or "fastest of each operator",
        **describe(device),
        **results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {options.out}")


def target(name: str, measured: float, limit: float) -> dict[str, Any]:
    """A figure beside the most that it may be."""
    record = {"target": name, "measured": round(measured, 4), "limit": limit, "reached": measured <= limit}
    print(f"{name}: {measured:.3f}, at most {limit} wanted")
    return record


def rounded(value: Any, digits: int = 4) -> Any:
    """All floats of a nested record to so many digits behind the point."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value
