"""What open queries and drafts add to a block step, in the shapes of LLaDA-8B and Dream-7B.

    python bench/cheaper_steps.py [--shapes llada-8b dream-7b] [--length 1280]

Each line is a step beside one that computes about as many positions, or the same windows without drafts:

    windows     branches of 4 to 64, all of whose windows are masked: 124 positions in a row of each
    open        the same branches with open queries
    scattered   branches of 8 to 128 with open queries of which half are decoded: about 124 positions,
                scattered over windows twice as wide
    one window  a window of 32
    drafts      the same with one, two or three drafts

On it the step's milliseconds (as in step_latency.py, the pages outside the windows shared), times `against`,
and the parts in which they can differ: attention, and what lies around the model (packing, copy on write,
policy). A line is measured after its step passed the checks of verify.py.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import parts
import torch
from cases import StepCase
from random_models import DTYPES, random_model
from timing import clean, device_of, in_turns, parser, rounded, target, write_report
from verify import check_step

from blockbatch.models import Model

_OPEN = {"query_span": "open"}


class Step(NamedTuple):
    """
    Attributes:
        name: of the line.
        sizes: block sizes of the rows.
        settings: of the policy.
        known: share of the canvas that is decoded.
        against: name of the step that this one is compared with.
    """

    name: str
    sizes: tuple[int, ...]
    settings: dict[str, Any]
    known: float
    against: str


def _drafts(count: int) -> Step:
    # A random model commits one token, so none of these comes true and the branch keeps its own forward.
    drafts = tuple(range(2, count + 2))
    return Step(f"drafts {count}", (32,) * (1 + count), {"drafts": drafts}, 0.0, "one window")


STEPS = (
    Step("windows", (4, 8, 16, 32, 64), {}, 0.0, "windows"),
    Step("open", (4, 8, 16, 32, 64), _OPEN, 0.0, "windows"),
    Step("scattered", (8, 16, 32, 64, 128), _OPEN, 0.5, "windows"),
    Step("one window", (32,), {}, 0.0, "one window"),
    *map(_drafts, (1, 2, 3)),
)


def make_case(model: Model, step: Step, length: int) -> StepCase:
    gen_length = min(256, length // 2)
    sizes = tuple(min(size, gen_length) for size in step.sizes)
    case = StepCase(model, sizes, length - gen_length, gen_length, known=step.known, **step.settings)
    case.run()  # the first run of a size captures it
    return case


def measure(model: Model, length: int, repeats: int) -> list[dict]:
    cases = [make_case(model, step, length) for step in STEPS]
    checks = [check_step(case) for case in cases]
    times = in_turns([(case.run, case.restore) for case in cases], model.device, repeats)
    lines: dict[str, dict] = {}
    for step, case, check, (taken, spread) in zip(STEPS, cases, checks, times, strict=True):
        lines[step.name] = {
            "model": model.name,
            "step": step.name,
            "length": length,
            "tokens": case.tokens,
            "branches": list(step.sizes),
            "ours_ms": taken,
            "ours_spread": spread,
            "against": step.against,
            "times_against": taken / lines[step.against]["ours_ms"] if step.against in lines else 1.0,
            "checks": check,
        }
    return list(lines.values())


def add_parts(model: Model, line: dict) -> None:
    """Adds the time of each part of the line's step."""
    step = next(step for step in STEPS if step.name == line["step"])
    case = make_case(model, step, line["length"])
    kernels = parts.record(case.run, model.device, case.restore)
    line["parts_ms"] = rounded(parts.split(kernels, model.spec.num_layers))


def targets(lines: list[dict]) -> list[dict]:
    """Of LLaDA-8B: what is around the model, scattered queries, and the price of drafts."""
    found, by_name = [], {line["step"]: line for line in lines if line["model"] == "llada-8b"}
    for name, line in by_name.items():
        if "parts_ms" not in line:
            continue
        found.append(target(f"{name}: around the model, ms", line["parts_ms"]["around_the_model"], 0.15))
        if name == "scattered":
            windows = by_name["windows"]["parts_ms"]["attention"]
            found.append(
                target(f"{name}: attention, times windows", line["parts_ms"]["attention"] / windows, 1.0)
            )
        if name.startswith("drafts") and line["tokens"] <= 96:
            found.append(target(f"{name}: times a step without", line["times_against"], 1.07))
    return found


def name_of(line: dict) -> str:
    return f"{line['model']:11} {line['step']:16} {line['tokens']:4} tokens:"


def show(line: dict) -> str:
    return (
        f"{name_of(line)} {line['ours_ms']:.3f} ms (+-{line['ours_spread']:.1%}),"
        f" {line['times_against']:.3f}x of {line['against']}"
    )


def read_options() -> argparse.Namespace:
    arguments = parser(__doc__, "cheaper_steps", ["llada-8b", "dream-7b"])
    arguments.add_argument("--length", type=int, default=1280)
    arguments.add_argument("--repeats", type=int, default=9)
    return arguments.parse_args()


@torch.inference_mode()
def main() -> None:
    options = read_options()
    device = device_of(options)
    lines: list[dict] = []
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        found = measure(model, options.length, options.repeats)
        for line in found:
            print(show(line), flush=True)
        lines += map(rounded, found)
        del model
        clean(device)
    parts.add_to_lines(options, device, lines, add_parts, name_of)
    write_report(options, device, targets=targets(lines), lines=lines)


if __name__ == "__main__":
    main()
