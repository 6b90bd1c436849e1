"""How far decodes of the built-in model on a GPU agree with others: fp32 with the CPU, bf16 with plain torch.

fp32 on the GPU is compared with fp32 on the CPU token for token and forward for forward, by every method.
bf16 is compared with the reference backend in bf16 on the same GPU, whose canvases need not be equal (sums in
another order round differently), and by how many answers are right. More columns say what such a number is
worth: how many canvases of either are those of fp32, and how many the reference backend repeats when it
decodes the same prompts four at a time.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch

import blockbatch
from blockbatch import tiny
from blockbatch.config import METHODS
from blockbatch.environment import describe

RESULTS = Path(__file__).parent / "results" / "agreement.json"
FAMILIES = ("arithmetic", "code", "symbolic")
GEN_LENGTH = 128


def problems(count):
    by_family = [tiny.generate_problems(family, "test", -(-count // 3), 0) for family in FAMILIES]
    return [problem for trio in zip(*by_family, strict=True) for problem in trio][:count]


def decode(model, chosen, method, together=1):
    """What each problem's decode gives, with `together` prompts in a call."""
    config = blockbatch.DecodeConfig(method=method, gen_length=GEN_LENGTH)
    prompts = [problem.prompt for problem in chosen]
    parts = [prompts[first : first + together] for first in range(0, len(prompts), together)]
    return [summary(result) for part in parts for result in blockbatch.generate(model, part, config)]


def summary(result):
    nfe = result.nfe
    return {"canvas": result.canvas, "nfe": [nfe.init, nfe.block, nfe.refresh], "text": result.text}


def decode_on_cpu(method, number, count):
    """One problem on the CPU; a process of its own, so that all cores are used."""
    torch.set_num_threads(1)
    model = blockbatch.load_model("tiny", device="cpu")
    return decode(model, [problems(count)[number]], method)[0]


def right(chosen, results):
    return sum(tiny.check(problem, result["text"]) for problem, result in zip(chosen, results, strict=True))


def equal(first, second, *keys):
    return sum(all(a[key] == b[key] for key in keys) for a, b in zip(first, second, strict=True))


def bf16_line(method, count):
    """How bf16 by one method compares; in a process of its own, since the reference leaves a GPU idle."""
    chosen = problems(count)
    exact = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    model = blockbatch.load_model("tiny", device="cuda", dtype="bfloat16")
    plain = blockbatch.load_model("tiny", device="cuda", dtype="bfloat16", backend="reference")
    ours, reference = decode(model, chosen, method), decode(plain, chosen, method)
    in_fp32, repeated = decode(exact, chosen, method), decode(plain, chosen, method, together=4)
    return {
        "dtype": "bfloat16",
        "method": method,
        "problems": len(chosen),
        "equal_to_the_reference": equal(ours, reference, "canvas"),
        "reference_equal_to_itself_in_fours": equal(reference, repeated, "canvas"),
        "equal_to_fp32": equal(ours, in_fp32, "canvas"),
        "reference_equal_to_fp32": equal(reference, in_fp32, "canvas"),
        "right": right(chosen, ours),
        "right_by_the_reference": right(chosen, reference),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="problems by every method in fp32")
    parser.add_argument("--bf16-count", type=int, default=100, help="problems in bf16")
    parser.add_argument("--bf16-methods", nargs="*", default=[name for name in METHODS if name != "vanilla"])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("agreement.py: a GPU is needed")

    chosen = problems(options.count)
    lines = []
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use a GPU that is in use
    executor = functools.partial(concurrent.futures.ProcessPoolExecutor, mp_context=spawn)
    with executor(options.processes) as pool, executor(max(1, len(options.bf16_methods))) as gpu_pool:
        on_cpu = {
            method: [
                pool.submit(decode_on_cpu, method, number, options.count) for number in range(len(chosen))
            ]
            for method in METHODS
        }
        in_bf16 = [gpu_pool.submit(bf16_line, method, options.bf16_count) for method in options.bf16_methods]
        model = blockbatch.load_model("tiny", device="cuda", dtype="float32")
        for method in METHODS:
            ours = decode(model, chosen, method)
            cpu = [future.result() for future in on_cpu[method]]
            lines.append(
                {
                    "dtype": "float32",
                    "method": method,
                    "problems": len(chosen),
                    "equal_to_the_cpu": equal(ours, cpu, "canvas", "nfe"),
                    "right": right(chosen, ours),
                    "right_on_the_cpu": right(chosen, cpu),
                }
            )
            print(lines[-1], flush=True)
        for future in in_bf16:
            lines.append(future.result())
            print(lines[-1], flush=True)
    report = {
        "command": "python bench/agreement.py",
        **describe(model.device),
        "model": "tiny",
        "gen_length": GEN_LENGTH,
        "eos_exit": "prefix",
        "lines": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    differ = [line for line in lines if line.get("equal_to_the_cpu", line["problems"]) != line["problems"]]
    sys.exit(f"agreement.py: fp32 differs from the CPU: {differ}" if differ else 0)


if __name__ == "__main__":
    main()
