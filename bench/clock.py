"""The comparison that counts: milliseconds of whole decodes, and right answers, by every setting.

    python bench/clock.py                       # recorded decodes in the shapes of large models, on a GPU
    python bench/clock.py --device cpu          # the built-in model itself: clock_cpu.json
    python bench/clock.py --record              # decodes anew what is followed (CPU)
    python bench/clock.py --calibrate 0.7 0.8   # tokens that a forward commits with the LM head scaled so
    python bench/clock.py --estimate            # the table without a GPU, by a measured curve of an H100

The built-in model decodes real problems by every setting, one request at a time and with the same end; its
head is scaled so that the dual cache commits 3 tokens a forward, as it does with 8B models. On the GPU a
model of random weights in a large shape follows these decodes forward by forward (traces.py): the same
windows, commits, shared pages, refreshes and drafts, with the prompt as long as wanted. Each must end with
the recorded canvas and number of forwards. All settings work on one cache and take turns on each problem.

Right answers and forwards are those of all recorded problems; milliseconds those of the problems that were
followed, the first few of each family as the seed draws them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import clock_record
import torch
from clock_live import measure_live
from clock_model import H100_BLOCK, h100_whole, modelled_ms
from clock_plot import draw
from clock_record import FOLDER, HEAD_SCALE, PROBLEMS, SEED, SPLIT, TRACED, Decode
from clock_replay import Section, turn_points
from clock_report import PHASES, answers, clocks, print_table, queries, targets
from clock_settings import DUAL, GEN_LENGTH, Row, chosen
from random_models import DTYPES, quantized, random_model
from timing import RESULTS, clean, device_of, parser, rounded, write_report
from traces import Followed

from blockbatch import tiny

BUILT_IN = "built-in"
# Problems of each family by shape and prompt length; fewer where the shape is one more example.
SECTIONS = {"llada-8b": {1024: 6, 160: 6}, "dream-7b": {1024: 3}}


def follow(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every setting in every shape."""
    rows = chosen(options.settings)
    decodes, traces = load(rows, options.folder)
    right = answers(decodes)
    sections, reached, begun = [], [], time.perf_counter()
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        if options.quantization is not None:
            model = quantized(model)
            clean(device)
        lengths = SECTIONS.get(name, {1024: 1})
        for prompt_length in options.prompt_lengths or lengths:
            problems = options.problems or (1 if options.quick else lengths.get(prompt_length, TRACED))
            problems = min(problems * len(tiny.FAMILIES), min(map(len, traces.values())))
            started = time.perf_counter()
            section = Section(model, prompt_length, traces)
            found = section.measure(problems, until=begun + options.seconds)
            lines, points = section_lines(section, found, decodes)
            title = (
                f"{name} on {device}, prompt of {prompt_length}, {len(next(iter(found.values())))} problems"
            )
            print_table(title, lines, right)
            taken = time.perf_counter() - started
            print(f"{taken:.0f} s")
            sections.append(
                {
                    "shape": name,
                    "prompt_length": prompt_length,
                    "seconds": taken,
                    "turn_ms": points,
                    "settings": lines,
                }
            )
            if name == "llada-8b":
                reached += targets(prompt_length, {line["setting"]: line for line in lines}, right)
            del section, found
            clean(device)
        del model
        clean(device)
    return {"answers": right, "sections": sections, "targets": reached}


def load(rows: list[Row], folder: Path) -> tuple[dict[str, list[Decode]], dict[Row, list]]:
    decodes, traces = {}, {}
    for row in rows:
        decodes[row.label], traces[row] = clock_record.load(row, folder)
    return decodes, traces


def section_lines(
    section: Section, found: dict[Row, list[Followed]], decodes: dict[str, list[Decode]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each setting took in one shape, and what turns took there.

    `all_problems` of a setting is what its turns on all recorded problems take by those that were measured.
    """
    prompt_length = section.prompt_length
    points = turn_points(found, section.recorded, prompt_length + GEN_LENGTH)
    times = {row.label: [decode.decode_ms for decode in followed] for row, followed in found.items()}
    modelled = {
        row.label: [
            modelled_ms(row, decode, prompt_length, points["block"], points["whole"])
            for decode in decodes[row.label]
        ]
        for row in found
    }
    measured, every, lines = clocks(decodes, times), clocks(decodes, modelled), []
    for row, followed in found.items():
        label, total = row.label, sum(times[row.label])
        spent = {phase: sum(sum(decode.phase_ms(phase)) for decode in followed) for phase in PHASES}
        lines.append(
            {
                "setting": label,
                **measured[label],
                **{f"share_{phase}": spent[phase] / total for phase in PHASES},
                "ms_by_phase": {phase: spent[phase] / len(followed) for phase in PHASES},
                "queries": queries(row, decodes[label][: len(followed)], prompt_length),
                "all_problems": {
                    **every[label],
                    "queries": queries(row, decodes[label], prompt_length),
                    "modelled_by_measured": sum(modelled[label][: len(followed)]) / total,
                },
            }
        )
    return lines, points


def estimate(options: argparse.Namespace) -> None:
    """Prints what decodes should take by the curve of an H100, of all recorded problems."""
    rows = chosen(options.settings)
    decodes = {row.label: clock_record.load(row, options.folder)[0] for row in rows}
    right = answers(decodes)
    for prompt_length in options.prompt_lengths or (1024, 160):
        whole = h100_whole()
        times = {
            row.label: [
                modelled_ms(row, decode, prompt_length, H100_BLOCK, whole) for decode in decodes[row.label]
            ]
            for row in rows
        }
        lines = [{"setting": label, **line} for label, line in clocks(decodes, times).items()]
        print_table(f"estimated, LLaDA-8B, prompt of {prompt_length}", lines, right)


def live(options: argparse.Namespace) -> dict[str, Any]:
    """The built-in model itself, as it is recorded, on the CPU."""
    torch.set_num_threads(options.threads)
    rows = chosen(options.settings)
    problems = clock_record.draw_problems(SPLIT, SEED, options.problems or 4)
    found = measure_live(clock_record.softer_model(), rows, problems, 1 if options.quick else 3)
    reference = found.get(DUAL) or next(iter(found.values()))
    lines = []
    for label, result in found.items():
        line = {
            "setting": label,
            "seconds_median": statistics.median(result.seconds),
            "seconds_mean": statistics.mean(result.seconds),
            "tokens_per_second": sum(result.tokens) / sum(result.seconds),
            "nfe": statistics.mean(result.nfe),
            "right": sum(result.right),
            "times_as_fast_as_dual_cache": sum(reference.seconds) / sum(result.seconds),
        }
        lines.append(line)
        print(
            f"{label:46} {line['seconds_median']:7.3f} s (median), {line['seconds_mean']:7.3f} (mean), "
            f"NFE {line['nfe']:5.1f}, {line['right']} of {len(problems)} right, "
            f"{line['times_as_fast_as_dual_cache']:.2f}x",
            flush=True,
        )
    return {"problems": len(problems), "settings": lines}


def read_options() -> argparse.Namespace:
    arguments = parser(__doc__, "clock", [])
    arguments.set_defaults(shapes=None, out=None)
    arguments.add_argument("--prompt-lengths", type=int, nargs="*", help="of every shape")
    arguments.add_argument("--problems", type=int, help="to decode, of each family")
    arguments.add_argument("--settings", nargs="*", help="labels of clock_settings.py")
    arguments.add_argument("--folder", type=Path, default=FOLDER, help="of the recorded decodes")
    arguments.add_argument(
        "--seconds", type=float, default=200, help="no further problem is begun after these"
    )
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--record", action="store_true", help="decode what --folder lacks")
    arguments.add_argument("--split", default=SPLIT)
    arguments.add_argument("--seed", type=int, default=SEED)
    arguments.add_argument(
        "--traced", type=int, default=TRACED, help="problems of each family to be followed"
    )
    arguments.add_argument("--estimate", action="store_true")
    arguments.add_argument("--calibrate", type=float, nargs="*", metavar="SCALE")
    arguments.add_argument("--quantization", choices=("fp8",), help="of the layers, on a GPU (with --out)")
    options = arguments.parse_args()
    if options.quantization is not None and options.out is None:
        arguments.error("--quantization: expected --out too, beside the file of the dtype alone")
    if options.shapes is None:
        options.shapes = list(SECTIONS) if options.device == "cuda" else [BUILT_IN]
    if options.out is None:
        options.out = RESULTS / ("clock_cpu.json" if options.shapes == [BUILT_IN] else "clock.json")
    return options


def main() -> None:
    options = read_options()
    if options.calibrate is not None:
        problems = clock_record.draw_problems("held_out", 5, options.problems or 20)
        torch.set_num_threads(options.threads)
        clock_record.calibrate(options.calibrate, chosen([DUAL])[0].config(), problems)
        return
    if options.record:
        torch.set_num_threads(options.threads)
        problems = clock_record.draw_problems(options.split, options.seed, options.problems or PROBLEMS)
        model = clock_record.softer_model()
        clock_record.record_all(model, chosen(options.settings), problems, options.traced, options.folder)
        return
    if options.estimate:
        estimate(options)
        return
    device = device_of(options)
    drawn = {"split": SPLIT, "seed": SEED, "head_scale": HEAD_SCALE, "gen_length": GEN_LENGTH}
    if options.shapes == [BUILT_IN]:
        options.dtype = "float32"
        write_report(options, device, **drawn, **rounded(live(options)))
        return
    report = follow(options, device)
    write_report(options, device, **drawn, **rounded(report))
    draw(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
