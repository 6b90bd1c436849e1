"""Whole decodes of the built-in model on the CPU: seconds, share of the loop around the model, peak memory.

    python bench/decode_cpu.py [--threads 2] [--out bench/results/decode_cpu.json]

Every decode is checked first: the timed run must give the tokens and the NFE of an untimed one. The loop's
share is what remains of a decode's time when the model's forwards are taken out. Peak memory is that of a
process of its own that loads the model and decodes once.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe

RESULT = Path(__file__).parent / "results" / "decode_cpu.json"


class TimedModel:
    """A model that adds up the seconds of its forwards; everything else is the model's own."""

    def __init__(self, model: blockbatch.Model) -> None:
        self._model, self.forward_seconds = model, 0.0

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def predict(self, *args, **kwargs):
        begun = time.perf_counter()
        result = self._model.predict(*args, **kwargs)
        self.forward_seconds += time.perf_counter() - begun
        return result


def measure(
    model: blockbatch.Model, prompts: list[str], config: blockbatch.DecodeConfig, repeats: int
) -> dict:
    seconds, outside, nfe, tokens = [], [], [], []
    for prompt in prompts:
        expected = blockbatch.generate(model, prompt, config)  # also the warm-up
        best = None
        for _ in range(repeats):
            timed = TimedModel(model)
            result = blockbatch.generate(timed, prompt, config)
            if (result.canvas, result.nfe) != (expected.canvas, expected.nfe):
                raise SystemExit(f"{config.method}: two decodes of {prompt!r} differ")
            sample = result.seconds, 1 - timed.forward_seconds / result.seconds
            best = min(best, sample) if best else sample
        seconds.append(best[0])
        outside.append(best[1])
        nfe.append(expected.nfe.total)
        tokens.append(len(expected.tokens))
    return {
        "method": config.method,
        "gen_length": config.gen_length,
        "eos_exit": config.eos_exit,
        "prompts": len(prompts),
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_max": round(max(seconds), 3),
        "nfe_mean": round(statistics.mean(nfe), 1),
        "nfe_max": max(nfe),
        "tokens_before_eos_mean": round(statistics.mean(tokens), 1),
        "share_outside_model_max": round(max(outside), 3),
        "share_outside_model_median": round(statistics.median(outside), 3),
    }


def sample_prompts(count: int) -> list[str]:
    return [
        problem.prompt
        for family in tiny.FAMILIES
        for problem in tiny.generate_problems(family, "test", count, seed=1)
    ]


def decode_once() -> None:
    """Peak memory of loading the model and one decode of a 256-token canvas, printed in bytes."""
    model = blockbatch.load_model("tiny", device="cpu")
    blockbatch.generate(model, sample_prompts(1)[0], blockbatch.DecodeConfig(gen_length=256, eos_exit="none"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", type=int, default=3, help="per family")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of these counts")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        decode_once()
        return
    torch.set_num_threads(options.threads)
    model = blockbatch.load_model("tiny", device="cpu")
    prompts = sample_prompts(options.prompts)
    rows = []
    for eos_exit in ("prefix", "none"):
        for method in ("blockbatch", "dual_cache"):
            config = blockbatch.DecodeConfig(method=method, gen_length=256, eos_exit=eos_exit)
            rows.append(measure(model, prompts, config, options.repeats))
            print(json.dumps(rows[-1]), flush=True)
    command = [sys.executable, __file__, "--peak-memory"]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"peak memory of one decode: {peak / 2**20:.0f} MiB")
    report = {
        "command": "python bench/decode_cpu.py",
        **describe(model.device),
        "peak_memory_bytes": peak,
        "decodes": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
