"""The LM head in e4m3 beside bf16, by itself and in block steps, in the shape of LLaDA-8B on a GPU.

    python bench/fp8_head.py [--shapes llada-8b] [--tokens 32 128 252] [--quick]

`heads` are ms of the LM head with so many predictions, from hidden states to tokens and confidences: `bf16`,
`fp8`, and of the latter the `product` and `quantize_rows` alone; calls in one CUDA graph. `steps` are those
of bench/step_latency.py in ms with nothing in e4m3 (`bf16`), with the layers (`fp8`) and with layers and LM
head (`fp8_all`), in turns. Everything is verified before it is timed.
"""

from __future__ import annotations

import step_latency
import torch
from fp8_step import LENGTH, MOST_ERROR, measure_step
from random_models import DTYPES, quantized, random_model
from timing import as_graph, clean, device_of, in_turns, parser, rounded, write_report
from verify import Wrong

import blockbatch_kernels as bbk
from blockbatch.models import Model
from blockbatch.models.quantized_weights import QuantizedWeight

TOKENS = (32, 128, 252)


def check_head(hidden: torch.Tensor, weight: QuantizedWeight) -> None:
    """Raises `Wrong` if a top token misses the highest logit by more than rounding explains."""
    options = dict(out_dtype=torch.float32, backend="reference")
    want = bbk.linear_fp8(*bbk.quantize_rows(hidden), weight.values, weight.scale, **options)
    top = bbk.lm_head_confidence_fp8(hidden, weight.values, weight.scale)[0]
    highest = want.amax(-1)
    missed = highest - want.gather(1, top.long()[:, None])[:, 0]
    # Two logits that were rounded to the model's dtype, and what tensor cores leave out of a sum.
    allowed = 2 * torch.finfo(hidden.dtype).eps * highest.abs() + MOST_ERROR * want.std()
    if not bool((missed <= allowed).all()):
        raise Wrong(f"LM head in e4m3, {len(hidden)} predictions: a top token misses by {missed.max():.3f}")


def measure_head(plain: Model, model: Model, predictions: int, repeats: int) -> dict:
    device, weight = model.device, model.weights.lm_head
    hidden = torch.randn(predictions, model.spec.hidden_size, device=device).to(model.dtype)
    check_head(hidden, weight)
    rows = bbk.quantize_rows(hidden)
    calls = {
        "bf16": lambda: bbk.lm_head_confidence(hidden, plain.weights.lm_head)[:2],
        "fp8": lambda: bbk.lm_head_confidence_fp8(hidden, weight.values, weight.scale)[:2],
        "product": lambda: bbk.linear_fp8(*rows, weight.values, weight.scale, out_dtype=model.dtype),
        "quantize_rows": lambda: bbk.quantize_rows(hidden),
    }
    runs = {name: as_graph(call, device) for name, call in calls.items()}
    taken = in_turns([(run, None) for run in runs.values()], device, repeats)
    line = {"predictions": predictions, "vocabulary": len(weight.values)}
    line["ms"] = {name: ms for name, (ms, _) in zip(runs, taken, strict=True)}
    line["gb_per_s"] = weight.nbytes / line["ms"]["fp8"] / 1e6
    print(rounded(line), flush=True)
    return rounded(line)


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "fp8_head", ["llada-8b"])
    arguments.add_argument("--tokens", nargs="*", type=int, choices=step_latency.BLOCK_SIZES, default=TOKENS)
    arguments.add_argument("--length", type=int, default=LENGTH)
    arguments.add_argument("--repeats", type=int, default=9)
    options = arguments.parse_args()
    device, repeats = device_of(options), 3 if options.quick else options.repeats
    report = []
    for shape in options.shapes:
        models = {"bf16": random_model(shape, device, DTYPES[options.dtype], backend=options.backend)}
        models["fp8"] = quantized(models["bf16"])
        models["fp8_all"] = quantized(models["fp8"], "fp8-all")
        found = {"model": shape, "heads": [], "steps": []}
        for tokens in options.tokens:
            found["heads"].append(measure_head(models["bf16"], models["fp8_all"], tokens, repeats))
            clean(device)
            found["steps"] += measure_step(models, tokens, options.length, repeats)
        report.append(found)
    write_report(options, device, shapes=report)


if __name__ == "__main__":
    main()
