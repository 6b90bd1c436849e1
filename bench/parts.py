"""Where the time of a step goes on the GPU: its kernels, recorded by the profiler and sorted into parts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from random_models import DTYPES, random_model
from timing import clean
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from blockbatch.models import Model

PARTS = ("products", "attention", "norm_rope_swiglu", "lm_head", "around_the_model")
_ELEMENTWISE = ("rms_norm", "rope", "swiglu", "embedding")
_AROUND = ("policy", "plan_kernel", "pages", "pack")
# Names that are these and nothing more, since torch has others that hold them.
_AROUND_EXACTLY = ("_share_kernel", "_choose_kernel", "_copy_kernel", "_count_kernel", "_scatter_kernel")


class Kernel(NamedTuple):
    name: str
    start_us: float
    end_us: float


def record(
    run: Callable[[], Any], device: torch.device, before: Callable[[], Any], repeats: int = 3
) -> list[Kernel]:
    """The kernels and copies of the fastest of some calls of `run`, each behind one of `before`, by start.

    Once the profiler has run, launches take longer in the rest of the process: measure other things first.
    """
    calls = []
    for _ in range(repeats):
        before()
        calls.append(_record_once(run, device))
    return min(calls, key=lambda kernels: max(kernel.end_us for kernel in kernels) - kernels[0].start_us)


def _record_once(run: Callable[[], Any], device: torch.device) -> list[Kernel]:
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        run()
        torch.cuda.synchronize(device)
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def split(kernels: list[Kernel], num_layers: int) -> dict[str, float]:
    """Milliseconds by part (see PARTS), `gaps` in which nothing ran, and the whole `span`.

    Names tell attention, norms, rope, activation and policy. The place tells the rest: between the first and
    the last norm of a forward what remains are products, behind it the LM head, and everything in front of it
    and behind the head is around the model. A kernel that is launched while the one before it still runs
    waits for that one's results, so it counts from then on: parts and gaps add up to the span.
    """
    totals = dict.fromkeys(PARTS, 0.0)
    place, norms, reached, gaps = "front", 0, kernels[0].start_us, 0.0
    for kernel in kernels:
        name = kernel.name.lower()
        if "rms_norm" in name:
            place, norms = "layers", norms + 1
            if norms == 2 * num_layers + 1:
                place, norms = "head", 0
        around = any(word in name for word in _AROUND) or name in _AROUND_EXACTLY
        if "attention" in name or "combine" in name:
            part = "attention"
        elif any(word in name for word in _ELEMENTWISE):
            part = "norm_rope_swiglu"
        elif around or place == "front":
            # The embedding is a plain gather by torch.
            part = "norm_rope_swiglu" if "gather" in name or "indexselect" in name else "around_the_model"
        elif place == "layers":
            part = "norm_rope_swiglu" if "elementwise" in name else "products"
        else:
            part = "lm_head"
        if place == "head" and (around or "attention_plan" in name):
            place = "front"
        gaps += max(0.0, kernel.start_us - reached) / 1e3
        totals[part] += max(0.0, kernel.end_us - max(kernel.start_us, reached)) / 1e3
        reached = max(reached, kernel.end_us)
    return {**totals, "gaps": gaps, "span": (reached - kernels[0].start_us) / 1e3}


def by_name(kernels: list[Kernel], count: int = 40) -> dict[str, list[float]]:
    """[milliseconds, launches] of the kernels that take longest, by name, overlaps included."""
    sums: dict[str, list[float]] = {}
    for kernel in kernels:
        entry = sums.setdefault(kernel.name[:120], [0.0, 0])
        entry[0] += (kernel.end_us - kernel.start_us) / 1e3
        entry[1] += 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: [round(value[0], 4), value[1]] for name, value in ordered[:count]}


def add_to_lines(
    options: argparse.Namespace,
    device: torch.device,
    lines: list[dict],
    add: Callable[[Model, dict], None],
    name_of: Callable[[dict], str],
) -> None:
    """Adds `parts_ms` to every line by `add(model, line)` and prints them; does nothing on a CPU.

    Times are to be measured before: once the profiler has run, launches take longer.
    """
    for name in options.shapes if device.type == "cuda" else ():
        clean(device)
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        for line in lines:
            if line["model"] == name:
                add(model, line)
                times = ", ".join(f"{part} {value:.3f}" for part, value in line["parts_ms"].items())
                print(f"{name_of(line)} {times}", flush=True)
                clean(device)
        del model
