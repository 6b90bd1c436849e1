"""What quantising to fp8 costs the built-in model in accuracy.

    python bench/fp8_accuracy.py [--of layers] [--device cpu] [--count 600] [--methods blockbatch ...]

The same problems are decoded by every method with everything in bf16, and with a part in e4m3: `--of layers`
the layers (`load_model(quantization="fp8")`), `kv` the K/V cache (`kv_dtype="fp8"`), `both`; `head` the
layers and the LM head (`quantization="fp8-all"`), with lines against bf16 and against the layers alone, and
the error of the logits. Reported are right answers of both with a paired test (McNemar), the ratio of
forwards, and how many canvases are the same; beside it the error of the hidden states behind each layer
against fp32, of bf16 alone and with e4m3. The gate: at most 1 point fewer right answers and no significant
difference, and forwards that change by at most 3%.

On the CPU the reference operators compute, on a GPU the compiled ones: the same arithmetic with sums in
another order, which tests/test_quantized.py holds. Errors by layer are always those of the reference.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
from pathlib import Path

import torch
from agreement import GEN_LENGTH, equal, problems, summary

import blockbatch
from blockbatch import tiny
from blockbatch.config import METHODS
from blockbatch.environment import describe
from blockbatch.evaluation.statistics import LEVEL, bootstrap_ratio, mcnemar, paired_difference

RESULTS = Path(__file__).parent / "results"
FILES = {
    "layers": "fp8_accuracy.json",
    "kv": "fp8_kv_accuracy.json",
    "both": "fp8_both_accuracy.json",
    "head": "fp8_head_accuracy.json",
}
DEFAULT_METHODS = tuple(name for name in METHODS if name != "vanilla")
PARTS = {
    "layers": dict(quantization="fp8"),
    "kv": dict(kv_dtype="fp8"),
    "both": dict(quantization="fp8", kv_dtype="fp8"),
    "head": dict(quantization="fp8-all"),
}
KINDS = ("bf16", "fp8")
MOST_POINTS, MOST_NFE = 1.0, 0.03


def options_of(kind: str, part: str) -> dict[str, str]:
    """Of `load_model`; `kind`: "bf16", "fp8", or a part that alone is in e4m3."""
    return dict(dtype="bfloat16", **(PARTS[part] if kind == "fp8" else PARTS.get(kind, {})))


def bases_of(part: str) -> tuple[str, ...]:
    """The kinds that a part in e4m3 is compared with."""
    return ("bf16", "layers") if part == "head" else ("bf16",)


def part_of(device: str, kind: str, part: str, method: str, count: int, first: int, size: int) -> list[dict]:
    """Decodes of `size` problems from `first` on, together; in a process of its own."""
    torch.set_num_threads(1)
    model = blockbatch.load_model("tiny", device=device, **options_of(kind, part))
    config = blockbatch.DecodeConfig(method=method, gen_length=GEN_LENGTH)
    prompts = [problem.prompt for problem in problems(count)[first : first + size]]
    return [summary(result) for result in blockbatch.generate(model, prompts, config)]


def line(method: str, chosen: list, results: dict[str, list[dict]], base: str = "bf16") -> dict:
    """The results of "fp8" against those of `base`."""
    right = {
        kind: [tiny.check(problem, result["text"]) for problem, result in zip(chosen, found, strict=True)]
        for kind, found in results.items()
    }
    only_fp8 = sum(new and not old for new, old in zip(right["fp8"], right[base], strict=True))
    only_base = sum(old and not new for new, old in zip(right["fp8"], right[base], strict=True))
    nfe = {kind: [sum(result["nfe"]) for result in found] for kind, found in results.items()}
    change = bootstrap_ratio(nfe["fp8"], nfe[base])
    low, high = paired_difference(only_fp8, only_base, len(chosen))
    points = 100 * (only_fp8 - only_base) / len(chosen)
    p_value = mcnemar(only_fp8, only_base)
    return {
        "method": method,
        "problems": len(chosen),
        f"right_{base}": sum(right[base]),
        "right_fp8": sum(right["fp8"]),
        f"only_{base}": only_base,
        "only_fp8": only_fp8,
        "points": round(points, 2),
        "points_95": [round(100 * low, 2), round(100 * high, 2)],
        "p_value": round(p_value, 4),
        "nfe_ratio": round(change.ratio, 4),
        "nfe_ratio_95": [round(bound, 4) for bound in change.interval_95],
        "equal_canvases": equal(results[base], results["fp8"], "canvas"),
        "answers_hold": points >= -MOST_POINTS and (p_value >= LEVEL or points > 0),
        "nfe_holds": abs(change.ratio - 1) <= MOST_NFE,
    }


def load_all(part: str) -> dict[str, blockbatch.Model]:
    models = {"fp32": blockbatch.load_model("tiny", device="cpu")}
    kinds = dict.fromkeys((*bases_of(part), *KINDS))
    return models | {
        kind: blockbatch.load_model("tiny", device="cpu", **options_of(kind, part)) for kind in kinds
    }


def decoded(model: blockbatch.Model, count: int) -> list[torch.Tensor]:
    """Whole canvases, the second half of what was decoded masked again."""
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH)
    prompts = [problem.prompt for problem in problems(count)]
    canvases = []
    for prompt, result in zip(prompts, blockbatch.generate(model, prompts, config), strict=True):
        ids = model.tokenizer.encode(prompt) + list(result.canvas)
        ids[-GEN_LENGTH // 2 :] = [model.spec.mask_token_id] * (GEN_LENGTH // 2)
        canvases.append(torch.tensor([ids]))
    return canvases


def logit_errors(models: dict[str, blockbatch.Model], canvases: list[torch.Tensor]) -> dict[str, float]:
    """Relative error of the logits against fp32."""
    exact = [models["fp32"].logits(ids).double() for ids in canvases]
    size, errors = torch.cat([one.flatten() for one in exact]).norm(), {}
    for kind in [kind for kind in models if kind != "fp32"]:
        pairs = zip(canvases, exact, strict=True)
        apart = [(models[kind].logits(ids).double() - one).flatten() for ids, one in pairs]
        errors[f"error_{kind}"] = round(float(torch.cat(apart).norm() / size), 5)
    return errors


def layer_errors(models: dict[str, blockbatch.Model], canvases: list[torch.Tensor]) -> list[dict]:
    """Relative error of the normed hidden states behind each layer, on whole canvases that fp32 decoded."""
    lines = []
    for depth in range(1, models["fp32"].spec.num_layers + 1):
        hidden = {}
        for kind in ("fp32", *KINDS):
            model = models[kind]
            weights = dataclasses.replace(model.weights, layers=model.weights.layers[:depth])
            spec = dataclasses.replace(model.spec, num_layers=depth)
            scales = dict(kv_scales=model.kv_scales)
            cut = blockbatch.Model(spec, weights, None, backend="reference", **scales)
            hidden[kind] = torch.cat([cut.hidden_states(ids).double() for ids in canvases])
        size = hidden["fp32"].norm()
        errors = {kind: float((hidden[kind] - hidden["fp32"]).norm() / size) for kind in KINDS}
        lines.append(
            {"layers": depth, **{f"error_{kind}": round(error, 5) for kind, error in errors.items()}}
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", default="layers", choices=PARTS, help="what is in e4m3")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--count", type=int, default=600, help="problems by every method")
    parser.add_argument("--methods", nargs="*", default=list(DEFAULT_METHODS), choices=METHODS)
    parser.add_argument("--together", type=int, default=20, help="problems decoded at once")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layer-count", type=int, default=12, help="canvases for the errors by layer")
    parser.add_argument("--out", type=Path, help="a file of its own for each --of, if left out")
    options = parser.parse_args()

    chosen, lines = problems(options.count), []
    kinds = (*bases_of(options.of), "fp8")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        parts = {
            (method, kind): [
                pool.submit(
                    part_of,
                    options.device,
                    kind,
                    options.of,
                    method,
                    options.count,
                    first,
                    options.together,
                )
                for first in range(0, options.count, options.together)
            ]
            for method in options.methods
            for kind in kinds
        }
        for method in options.methods:
            results = {
                kind: [result for part in parts[method, kind] for result in part.result()] for kind in kinds
            }
            for base in bases_of(options.of):
                lines.append(line(method, chosen, {kind: results[kind] for kind in (base, "fp8")}, base))
                print(lines[-1], flush=True)
    models = load_all(options.of)
    canvases = decoded(models["fp32"], options.layer_count)
    command = ["python bench/fp8_accuracy.py", *([] if options.of == "layers" else ["--of", options.of])]
    command += ["--device", options.device, "--count", str(options.count)]
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    report = {
        "command": " ".join([*command, "--methods", *options.methods]),
        **describe(device),
        "model": "tiny",
        "gen_length": GEN_LENGTH,
        "decodes": lines,
        "layers": layer_errors(models, canvases),
        **({"logits": logit_errors(models, canvases)} if options.of == "head" else {}),
    }
    out = options.out or RESULTS / FILES[options.of]
    out.write_text(json.dumps(report, indent=1) + "\n")
    missed = [one["method"] for one in lines if not (one["answers_hold"] and one["nfe_holds"])]
    print("within the gate" if not missed else f"beyond the gate: {', '.join(missed)}")


if __name__ == "__main__":
    main()
