"""Whole decodes in the shape of LLaDA-8B: time per forward and per decode, and memory.

    python bench/decode.py [--prompt-length 1024] [--gen-length 128]

Three kinds of decode, by BlockBatch and by the dual cache (block size 32) on this engine, and by BlockBatch
in plain torch, launched operator by operator (see eager.py):

    random    random weights: no confidence reaches a threshold, so each forward commits one token a branch,
              and a canvas is filled. The published implementation was measured in this way.
    traces    decodes of the built-in model, followed step by step in the large shape (see traces.py); a
              decode that does not end with the recorded canvas and number of forwards is an error.
    small     100 decodes of the built-in model itself, one after the other: memory must stay.

Before anything is timed, a block step passes the checks of verify.py. `random` decodes run under
`torch.cuda.set_sync_debug_mode("error")` once: nothing in a step may wait for the GPU but the one wait of the
loop. `memory` is what a decode at a canvas of 1280 positions takes beyond weights and K/V cache: at most
allocated, and at most reserved from the driver.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence

import torch
import traces
from cases import StepCase
from eager import EagerModel
from random_models import DTYPES, random_model, random_prompt
from timing import clean, device_of, parser, rounded, synchronize, target, write_report
from verify import Wrong, check_step

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import branches, tiny
from blockbatch.decoding import METHOD_BUILDERS, Session
from blockbatch.decoding.session import Runner, new_runner
from blockbatch.models import Model

STEADY_DECODES, STEADY_PROMPTS = 100, 5
MEMORY_LENGTHS = (1024, 256)
_FITTING = (4, 8, 16, 32, 64, 128)


def configs(gen_length: int) -> dict[str, blockbatch.DecodeConfig]:
    sizes = tuple(size for size in _FITTING if gen_length % size == 0)
    return {
        "blockbatch": blockbatch.DecodeConfig(gen_length=gen_length, block_sizes=sizes, eos_exit="none"),
        "dual_cache": blockbatch.DecodeConfig(
            method="dual_cache", gen_length=gen_length, block_size=min(32, gen_length), eos_exit="none"
        ),
    }


class Decode:
    """Runs decodes of one shape, one after the other, on the same buffers and graphs."""

    def __init__(self, model, config: blockbatch.DecodeConfig, prompt: list[int], method=None) -> None:
        self.model, self.config, self.prompt = model, config, prompt
        self.method = method or METHOD_BUILDERS[config.method](
            config, model.spec, tuple(model.spec.eos_token_ids)
        )
        self.runner: Runner = new_runner(model, 1, self.method, config.gen_length, len(prompt))

    def session(self) -> Session:
        return Session(self.model, [self.prompt], self.method, self.config.gen_length, runner=self.runner)

    def run(self) -> dict:
        """One decode.

        Returns:
            nfe [init, block, refresh], canvas, decode_ms, and the milliseconds of each kind of forward.
        """
        synchronize(self.model.device)
        session = self.session()
        steps = []
        while (step := session.step()) is not None:
            steps.append((step.phase, 1e3 * step.seconds))
        outcome = branches.read_outcome(session.state, 0)
        nfe = [outcome.nfe.init, outcome.nfe.block, outcome.nfe.refresh]
        return {"nfe": nfe, "canvas": outcome.canvas, **summary(nfe, steps)}


def summary(nfe: Sequence[int], steps: list[tuple[str, float]]) -> dict:
    """Milliseconds of a decode, of a forward, and of each kind of turn."""
    total = sum(taken for _, taken in steps)
    spans = {phase: [taken for name, taken in steps if name == phase] for phase in bbk.PHASES}
    return {
        "decode_ms": total,
        "ms_per_nfe": total / sum(nfe),
        **{f"{phase}_ms": statistics.median(times) for phase, times in spans.items() if times},
    }


def random_decode(decode: Decode, repeats: int) -> dict:
    """Times a decode that fills its canvas; two of them must give the same result."""
    decode.run()
    timed = [decode.run() for _ in range(repeats)]
    first = timed[0]
    for other in timed[1:]:
        if (first["canvas"], first["nfe"]) != (other["canvas"], other["nfe"]):
            raise Wrong("two decodes of one prompt: expected the same canvas and NFE, got different ones")
    if decode.model.spec.mask_token_id in first["canvas"]:
        raise Wrong("canvas: expected no MASK at the end of a decode, got one")
    # The best decode, and how far the others lie from it.
    best = min(timed, key=lambda result: result["decode_ms"])
    slowest = max(result["decode_ms"] for result in timed)
    return {**without_canvas(best), "spread": slowest / best["decode_ms"] - 1}


def without_canvas(result: dict) -> dict:
    return {key: value for key, value in result.items() if key != "canvas"}


def without_waits(decode: Decode, nfe: int) -> str:
    """One decode but for its last turn, which reads the result, in which no torch call may wait."""
    session = decode.session()
    with warnings.catch_warnings():  # that the mode does not see every kind of wait
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(nfe - 1):
            session.step()
    except RuntimeError as error:
        raise Wrong(f"turns of a decode: expected no wait, got: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"no wait in {nfe - 1} turns"


def follow(model: Model, trace: traces.Trace, prompt: list[int], followers: dict) -> Callable[[], dict]:
    """A function that decodes along a trace; decodes of one method share their buffers."""
    key = (trace.config, model.backend)
    if key not in followers:
        followers[key] = traces.Follower(traces.FollowingModel(model), trace, prompt)

    def run() -> dict:
        followed = followers[key].run(trace)
        return {"nfe": list(followed.nfe), **summary(followed.nfe, followed.steps_ms)}

    return run


def follow_all(model: Model, prompt_length: int, quick: bool) -> list[dict]:
    prompt = random_prompt(model.spec, prompt_length)
    plain = EagerModel(model)
    lines, followers = [], {}
    for trace in traces.load_all():
        if quick and not trace.name.startswith("symbolic_0.9_"):
            continue
        run = follow(model, trace, prompt, followers)
        run()
        line = {"trace": trace.name, "method": trace.config.method, "ours": min_of(run, 3)}
        if trace.config.method == "blockbatch":
            line["eager"] = min_of(follow(plain, trace, prompt, followers), 2)
        lines.append(line)
        eager = f", eager {line['eager']['decode_ms']:.0f} ms" if "eager" in line else ""
        ours = line["ours"]
        print(
            f"{trace.name:32} NFE {ours['nfe']}: {ours['decode_ms']:.1f} ms, {ours['ms_per_nfe']:.2f} per NFE"
            f"{eager}",
            flush=True,
        )
    return lines


def min_of(run: Callable[[], dict], repeats: int) -> dict:
    return min((run() for _ in range(repeats)), key=lambda result: result["decode_ms"])


def memory_beyond(model: Model, prompt_length: int, gen_length: int) -> dict:
    """Peak memory of a decode beyond weights and cache, buffers, graphs and the first forward included."""
    config = configs(gen_length)["blockbatch"]
    clean(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    allocated, reserved = torch.cuda.memory_allocated(model.device), torch.cuda.memory_reserved(model.device)
    decode = Decode(model, config, random_prompt(model.spec, prompt_length))
    decode.run()
    cache = decode.runner.batch.cache.kv.nbytes
    return {
        "canvas_length": prompt_length + gen_length,
        "cache_gb": cache / 1e9,
        "allocated_beyond_gb": (torch.cuda.max_memory_allocated(model.device) - allocated - cache) / 1e9,
        "reserved_beyond_gb": (torch.cuda.max_memory_reserved(model.device) - reserved - cache) / 1e9,
    }


def steady_memory(device: torch.device, decodes: int) -> dict:
    """Memory after each of many decodes of the built-in model; growth behind the first round is an error."""
    model = blockbatch.load_model("tiny", device=device)
    prompts = [
        problem.prompt for problem in tiny.generate_problems(tiny.FAMILIES[0], "test", STEADY_PROMPTS, seed=1)
    ]
    config = blockbatch.DecodeConfig(gen_length=128)
    seen = []
    for number in range(decodes + STEADY_PROMPTS):
        blockbatch.generate(model, prompts[number % len(prompts)], config)
        if number >= STEADY_PROMPTS:
            seen.append((torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)))
    grown = [max(column) - column[0] for column in zip(*seen)]
    if any(grown):
        raise Wrong(
            f"memory over {decodes} decodes: expected no growth, got {grown} bytes (allocated, reserved)"
        )
    return {"decodes": decodes, "allocated_bytes": seen[0][0], "reserved_bytes": seen[0][1], "growth": 0}


def report_random(model: Model, options: argparse.Namespace) -> dict[str, dict]:
    prompt = random_prompt(model.spec, options.prompt_length)
    results: dict[str, dict] = {}
    for method, config in configs(options.gen_length).items():
        decode = Decode(model, config, prompt)
        results[f"{method}, ours"] = random_decode(decode, 2)
        if model.device.type == "cuda":
            results[f"{method}, ours"]["waits"] = without_waits(
                decode, sum(results[f"{method}, ours"]["nfe"])
            )
        del decode
    plain = Decode(EagerModel(model), configs(options.gen_length)["blockbatch"], prompt)
    results["blockbatch, eager"] = without_canvas(plain.run())
    ours = results["blockbatch, ours"]["ms_per_nfe"]
    for name, result in results.items():
        result["times_ours_per_nfe"] = result["ms_per_nfe"] / ours
        print(
            f"random, {name:18} NFE {result['nfe']}: {result['decode_ms']:.0f} ms, "
            f"{result['ms_per_nfe']:.3f} ms per NFE, block {result['block_ms']:.3f}, "
            f"refresh {result.get('refresh_ms', 0.0):.2f}",
            flush=True,
        )
    return results


def targets(models: dict[str, dict]) -> list[dict]:
    """What decodes in the shape of LLaDA-8B are to reach, as far as they were measured."""
    found = models.get("llada-8b")
    if found is None or "memory" not in found:
        return []
    return [
        target("random decode: ms per NFE", found["random"]["blockbatch, ours"]["ms_per_nfe"], 9.9),
        target("memory beyond weights and cache, GB", found["memory"]["reserved_beyond_gb"], 0.6),
    ]


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "decode", ["llada-8b"])
    arguments.add_argument("--prompt-length", type=int, default=1024)
    arguments.add_argument("--gen-length", type=int, default=128)
    arguments.add_argument("--steady-decodes", type=int, default=STEADY_DECODES)
    options = arguments.parse_args()
    device = device_of(options)
    models = {}
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        sizes = configs(options.gen_length)["blockbatch"].block_sizes
        case = StepCase(model, sizes, options.prompt_length, options.gen_length)
        case.run()
        found = {"checks": rounded(check_step(case))}
        del case
        clean(device)
        found["random"] = rounded(report_random(model, options))
        clean(device)
        if device.type == "cuda":
            found["memory"] = rounded(memory_beyond(model, *MEMORY_LENGTHS))
            print(found["memory"], flush=True)
            clean(device)
        found["traces"] = rounded(follow_all(model, options.prompt_length, options.quick))
        clean(device)
        models[name] = found
        del model
    report = {"models": models}
    if device.type == "cuda":
        report["steady_memory"] = steady_memory(device, options.steady_decodes)
        print(report["steady_memory"])
    report["targets"] = targets(models)
    write_report(
        options, device, prompt_length=options.prompt_length, gen_length=options.gen_length, **report
    )


if __name__ == "__main__":
    main()
