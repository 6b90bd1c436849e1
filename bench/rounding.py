"""How many bf16 canvases of the built-in model depend on nothing but how sums are rounded.

    python bench/rounding.py [--count 100] [--methods blockbatch dual_cache]

Two programs that compute the same in bf16 differ by roundings. How many canvases that alone changes says what
agreement with plain torch (agreement.py) can mean. Each method decodes the same problems on the CPU in plain
torch as it is, in fp32, and in bf16 with one of these differences, each as exact as what it replaces:

    split_sums       every product of a layer as the sum of its halves in fp32, rounded once
    exact_gates      gates and ups are not rounded before the activation
    rounded_weights  attention's softmax weights are rounded to bf16, as tensor cores take them
    all_three        together

On each line: how many canvases are those of bf16 as it is, and how many answers are right, with it and as it
is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from agreement import GEN_LENGTH, decode, equal, problems, right
from torch import Tensor

import blockbatch
from blockbatch.config import METHODS
from blockbatch.environment import describe
from blockbatch_kernels import reference
from blockbatch_kernels.reference import gemm

RESULT = Path(__file__).parent / "results" / "rounding.json"
DIFFERENCES = ("split_sums", "exact_gates", "rounded_weights", "all_three")
DEFAULT_METHODS = tuple(name for name in METHODS if name != "vanilla")


def split_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, static_weight: bool = False
) -> Tensor:
    half = x.shape[1] // 2
    parts = (slice(None, half), slice(half, None))
    total = sum(F.linear(x[:, part].float(), weight[:, part].float()) for part in parts)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def exact_gates(x: Tensor, weight: Tensor, *, static_weight: bool = False) -> Tensor:
    gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def rounded_weights(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, attend: Callable[..., Tensor]
) -> Tensor:
    """In place of torch's attention on bf16; everything else goes to `attend`, which it is."""
    if query.dtype != torch.bfloat16:
        return attend(query, key, value, scale=scale)
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights.to(query.dtype).float() @ value.float() / weights.sum(-1, keepdim=True)).to(query.dtype)


def patches_of(name: str) -> list[tuple]:
    """What `mock.patch.object` takes to give plain torch the difference `name`."""
    attend = F.scaled_dot_product_attention
    patches = {
        "split_sums": [(module, "linear", split_sums) for module in (reference, gemm)],
        "exact_gates": [(reference, "linear_swiglu", exact_gates)],
        "rounded_weights": [
            (F, "scaled_dot_product_attention", functools.partial(rounded_weights, attend=attend))
        ],
    }
    return sum(patches.values(), []) if name == "all_three" else patches[name]


def measure(method: str, count: int) -> list[dict]:
    chosen = problems(count)
    model = blockbatch.load_model("tiny", device="cpu", dtype="bfloat16")
    as_it_is = decode(model, chosen, method)
    results = {"fp32": decode(blockbatch.load_model("tiny", device="cpu"), chosen, method)}
    for name in DIFFERENCES:
        with contextlib.ExitStack() as patched:
            for patch in patches_of(name):
                patched.enter_context(mock.patch.object(*patch))
            results[name] = decode(model, chosen, method)
    return [
        {
            "method": method,
            "difference": name,
            "problems": len(chosen),
            "equal_to_bf16": equal(found, as_it_is, "canvas"),
            "right": right(chosen, found),
            "right_as_it_is": right(chosen, as_it_is),
        }
        for name, found in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="problems by every method")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=DEFAULT_METHODS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    lines = []
    for method in options.methods:
        for line in measure(method, options.count):
            lines.append(line)
            print(line, flush=True)
    report = {
        "command": "python bench/rounding.py",
        **describe(torch.device("cpu")),
        "model": "tiny",
        "gen_length": GEN_LENGTH,
        "eos_exit": "prefix",
        "lines": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
