"""The engine under load, without HTTP: what its steps cost, how large they should be, what fixed bits cost.

    python bench/serve_engine.py [--settings dual_cache ...] [--clients 8 32]
    python bench/serve_engine.py --budgets 512 1024 2048 4096 [--clients 32]
    python bench/serve_engine.py --deterministic
    python bench/serve_engine.py --profile

`--budgets` gives a line for each largest size of a step (`Engine(max_tokens_per_step=)`), `--deterministic`
one with and one without fixed bits. Of every line: tokens a second before the end of the texts, tokens that
were forwarded for each, milliseconds of a step and of an answer, and those by which whole rows of others
held up the windows of a step (beyond the median of steps without). On a GPU a step's milliseconds are split
into those until the host waits, those that it waits and those behind; the first kernels of a step are
launched in the first, so that the GPU is idle in the last and in a part of the first. `--profile` also adds
up the time of the kernels in 40 steps and names those that take longest. The file is written after every
line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import serve_model
import torch
from random_models import DTYPES
from serve_settings import RULES, SETTINGS, config_of
from timing import write_report

from blockbatch.decoding.engine import Engine, EngineClosedError

RESULTS = Path(__file__).parent / "results"
MOST_QUEUED = 4096
# Positions of the engine's cache on a GPU, which two processes share here: 24 GiB in the shape of LLaDA-8B.
CACHE_TOKENS = 48 * 1024
# Steps under the profiler, and those before that it does not record.
_PROFILED, _BEFORE = 40, 20


def new_engine(model: Any, setting: str, options: dict[str, Any], **more: Any) -> Engine:
    sizes = dict(max_requests=options["max_requests"], cache_tokens=options["cache_tokens"])
    return Engine(model, max_queue=MOST_QUEUED, branches=RULES[setting], **sizes, **more)


class Load:
    """So many requests in an engine all the time, until all prompts are answered."""

    def __init__(self, engine: Engine, prompts: Sequence[list[int]], config: Any, clients: int) -> None:
        self.engine, self._prompts, self._config = engine, prompts, config
        self._waiting, self.ended = list(range(len(prompts))), []
        for _ in range(clients):
            self._submit()

    def _submit(self) -> None:
        if self._waiting:
            number = self._waiting.pop(0)
            self.engine.submit(self._prompts[number], self._config, on_update=self._note)

    def _note(self, request: Any) -> None:
        if request.ended and not isinstance(request.error, EngineClosedError):
            if request.error is not None:
                raise SystemExit(f"engine: {request.error!r}")
            self.ended.append(request)
            self._submit()

    def step(self) -> bool:
        return self.engine.step()


class Waits:
    """Times the host's waits for the device, while it is entered."""

    def __enter__(self) -> Waits:
        self.begin, self.seconds, self._own = None, 0.0, torch.cuda.Event.synchronize

        def synchronize(event: torch.cuda.Event) -> None:
            self.begin = time.perf_counter()
            self._own(event)
            self.seconds = time.perf_counter() - self.begin

        torch.cuda.Event.synchronize = synchronize
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.Event.synchronize = self._own


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the median, the 99th of a hundred, the longest."""
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(0.99 * (len(ordered) - 1))]
    return {
        name: 1e3 * value
        for name, value in (("p50", statistics.median(ordered)), ("p99", p99), ("longest", ordered[-1]))
    }


def whole_forwards(engine: Engine) -> int:
    """Forwards that held whole rows, so far."""
    forwards = engine.stats().forwards
    return forwards["init"] + forwards["refresh"]


def measured(
    model: Any,
    prompts: list[list[int]],
    setting: str,
    clients: int,
    options: dict[str, Any],
    **engine_options: Any,
) -> dict[str, Any]:
    """A line: all prompts with so many requests at a time, after a first round that does not count."""
    engine = new_engine(model, setting, options, **engine_options)
    config = config_of(setting, options["gen_length"])
    first = Load(engine, prompts[: max(2 * clients, 8)], config, clients)
    while first.step():
        pass
    before, load, parts = engine.stats(), Load(engine, prompts, config, clients), []
    windows, mixed = [], []  # seconds of steps of windows alone, and of those with whole rows
    whole = whole_forwards(engine)
    begun, going = time.perf_counter(), True
    with Waits() as waits:
        while going:
            start = time.perf_counter()
            going = load.step()
            end = time.perf_counter()
            (windows if whole_forwards(engine) == whole else mixed).append(end - start)
            whole = whole_forwards(engine)
            if waits.begin is not None:
                launch = waits.begin - start
                parts.append((launch, waits.seconds, end - start - launch - waits.seconds))
    seconds = time.perf_counter() - begun
    if len(load.ended) != len(prompts):
        raise SystemExit(f"engine: {len(load.ended)} of {len(prompts)} requests ended")
    after, requests = engine.stats(), load.ended
    tokens = sum(len(request.result.tokens) for request in requests)
    steps, forwarded = after.steps - before.steps, after.tokens - before.tokens
    found = {
        "setting": setting,
        "by": "engine",
        "at_a_time": clients,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_a_step": forwarded / steps,
        "forwarded_per_token": forwarded / tokens,
        "forwards": {name: after.forwards[name] - before.forwards[name] for name in after.forwards},
        "branches": statistics.mean(request.branches for request in requests),
        "step_ms": spread(windows + mixed),
        "whole_ms": spread([request.finished - request.submitted for request in requests]),
        "first_ms": spread([(request.first or request.finished) - request.submitted for request in requests]),
    }
    if windows and mixed:
        found["held_up_ms"] = spread([span - statistics.median(windows) for span in mixed])
    if parts:
        names = ("launching", "waiting", "behind")
        found["host_ms_a_step"] = {
            name: 1e3 * statistics.mean(column) for name, column in zip(names, zip(*parts))
        }
    if options.get("profile"):
        found["profile"] = profile(Load(engine, prompts, config, clients))
    engine.close()
    return found


def profile(load: Load) -> dict[str, Any]:
    """Wall time and kernels of some steps in the midst of a load."""
    for _ in range(_BEFORE):
        load.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        begun = time.perf_counter()
        for _ in range(_PROFILED):
            load.step()
        wall = time.perf_counter() - begun
    events = profiler.key_averages()

    def spent(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    longest = sorted(events, key=spent, reverse=True)[:16]
    return {
        "steps": _PROFILED,
        "wall_ms": 1e3 * wall / _PROFILED,
        "kernels_ms": sum(map(spent, events)) / 1e3 / _PROFILED,
        "longest": [
            {"name": event.key[:80], "ms": spent(event) / 1e3 / _PROFILED, "calls": event.count / _PROFILED}
            for event in longest
        ],
    }


def lines_of(model: Any, prompts: list[list[int]], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for setting in options["settings"]:
        for clients in options["clients"]:
            few = prompts[: options["rounds"] * clients]
            runs: list[dict[str, Any]] = [{"max_tokens_per_step": budget} for budget in options["budgets"]]
            if options["deterministic"]:
                runs = [{"deterministic": fixed} for fixed in (False, True)]
            for run in runs or [{}]:
                line = {**run, **measured(model, few, setting, clients, options, **run)}
                tell(line, " ".join(f"{name} = {value}" for name, value in run.items()))
                yield line


def tell(line: dict[str, Any], about: str = "") -> None:
    step, answer, host = line["step_ms"], line["whole_ms"], line.get("host_ms_a_step", {})
    held = line.get("held_up_ms") or dict.fromkeys(("p50", "p99", "longest"), float("nan"))
    print(
        f"{line['setting']:32} {line['at_a_time']:3} {about} {line['tokens_per_s']:8.1f} tokens/s, "
        f"{line['forwarded_per_token']:.1f} forwarded a token, {line['tokens_a_step']:.0f} a step; "
        f"ms of a step {step['p50']:.1f}, {step['p99']:.1f}, {step['longest']:.1f}, "
        f"held up {held['p50']:.1f}, {held['p99']:.1f}, {held['longest']:.1f}, "
        f"of an answer {answer['p50']:.0f}, {answer['p99']:.0f}; host "
        + ", ".join(f"{name} {value:.2f}" for name, value in host.items()),
        flush=True,
    )
    if "profile" in line:
        found = line["profile"]
        print(f"  wall {found['wall_ms']:.2f} ms a step, kernels {found['kernels_ms']:.2f}")
        for one in found["longest"]:
            print(f"    {one['ms']:8.3f} ms {one['calls']:6.1f} x {one['name']}")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def save(options: argparse.Namespace, device: torch.device, last: bool, **results: Any) -> None:
    """Writes the file, at first without a word, so that a run that is cut off leaves what it has."""
    with contextlib.nullcontext() if last else contextlib.redirect_stdout(io.StringIO()):
        about = dict(model=options.model, quantization=options.quantization, gen_length=options.gen_length)
        write_report(options, device, **about, **rounded(results))


def arguments(description: str, on_gpu: bool) -> argparse.ArgumentParser:
    """The options that both benchmarks of serving take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llada-8b" if on_gpu else "tiny", help="tiny, or a shape")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--quantization", choices=("fp8", "fp8-all"), help="of random weights")
    parser.add_argument("--backend", choices=("reference", "triton", "cuda"))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=16, help="requests for each client, at most")
    parser.add_argument("--prompt-length", type=int, default=256, help="of random weights")
    parser.add_argument("--gen-length", type=int, default=256 if on_gpu else 128)
    parser.add_argument("--max-requests", type=int, default=64)
    parser.add_argument("--cache-tokens", type=int, default=CACHE_TOKENS if on_gpu else None, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = arguments(__doc__, on_gpu)
    parser.add_argument("--budgets", nargs="*", type=int, default=[], metavar="TOKENS")
    parser.add_argument("--deterministic", action="store_true", help="with and without fixed bits")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / ("serve_engine.json" if on_gpu else "serve_engine_cpu.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {key: value for key, value in vars(options).items() if key != "out"}
    model, prompts = serve_model.load(given)
    lines: list[dict[str, Any]] = []
    for line in lines_of(model, prompts, given):
        lines.append(line)
        save(options, model.device, False, requests=options.requests, lines=lines)
    save(options, model.device, True, requests=options.requests, lines=lines)


if __name__ == "__main__":
    main()
