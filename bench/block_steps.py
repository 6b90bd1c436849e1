"""Forwards of block-causal models in the shapes of SDAR-8B and Fast-dLLM v2 7B, on random weights.

    python bench/block_steps.py [--shapes sdar-8b ...] [--stored 4096] [--prompt 4096]

One line for every model and forward: "denoise" of one block and of several branches of it, "fused" (a store
with the next block's denoise), "prefill" of a prompt in blocks of the trained size and of 4, and "found": the
prefill of what a prefix cache did not have. On it:

    ours_ms       clock time of a forward as a decode makes it, from packing ids to predictions on the host
    graph_ms      the device's time of the same forward, where it is a CUDA graph
    products_ms   its matrix products alone, by cuBLAS in a CUDA graph on the same weights
    kv_ms         bytes of the K/V that it reads, at the speed of a copy

Every model is verified first: confidences of a block behind a prompt err against fp32 at most twice as
much as those of the reference backend in the same dtype.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import products
import torch
from random_models import DTYPES, random_model, random_prompt, with_backend
from timing import ceilings, clean, device_of, event_ms, parser, rounded, target, wall_ms, write_report
from verify import upcast

from blockbatch.decoding.block_forward import BlockForward, Row
from blockbatch.decoding.block_text import BlockText
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models import Model
from blockbatch.text_pages import TextPages

# Tokens of a prompt that are computed at once, as decodes do on a GPU.
ROW_TOKENS = 2048
BRANCHES = (1, 2, 4)
FOUND = (0.0, 0.5, 0.75)


def new_pool(model: Model, positions: int) -> TextPages:
    spec = model.spec
    sizes = dict(num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    # Pages of other branches, beside those of the text.
    pages = positions // PAGE_SIZE + 1 + sum(BRANCHES) * spec.block_size
    pool = TextPages(pages, **sizes, dtype=model.dtype, device=model.device)
    pool.reserve(pages)
    return pool


def new_text(model: Model, length: int, more: int) -> BlockText:
    """A text of random ids with pages for `more` behind them."""
    pool = new_pool(model, length + more)
    text = BlockText(random_prompt(model.spec, length), pool, model.spec.max_length, model.spec.mask_token_id)
    if not text.make_room(length + more):
        raise SystemExit(f"expected room for {length + more} positions, got less")
    text.ids += [text.mask] * more
    return text


def verify(model: Model, length: int) -> dict[str, float]:
    """Raises SystemExit if a block's predictions err by more than twice what the reference backend's do.

    Both compute in the model's dtype, behind a prompt of `length` tokens, and are held against the
    reference's arithmetic in fp32.
    """
    size = model.spec.block_size
    text = new_text(model, length // size * size, size)
    stop = len(text.ids)
    found = []
    for one in (model, with_backend(model, "reference")):
        run = BlockForward(one, text.pool).run
        run(text.blocks(0, stop - size, size), ROW_TOKENS)
        found.append(run([text.row(stop - size, stop, stop, range(stop - size, stop))], ROW_TOKENS)[0])
    weights = dataclasses.replace(upcast(model.weights), lm_head=model.weights.lm_head.float())
    exact = Model(model.spec, weights, None, backend="reference", name=model.name)
    logits = exact.logits([text.ids], block_size=size)[0, -size:].float()
    if model.spec.suppress_mask:
        logits[:, model.spec.mask_token_id] = float("-inf")
    text.release()
    truth = logits.log_softmax(-1).amax(-1).cpu()
    ours, reference = (torch.tensor([value for _, value in pairs]).log() - truth for pairs in found)
    errors = {"log_confidence_error": rms(ours), "reference_log_confidence_error": rms(reference)}
    if not errors["log_confidence_error"] <= 2 * errors["reference_log_confidence_error"] + 1e-4:
        raise SystemExit(f"{model.name}: expected an error of at most twice the reference's, got {errors}")
    top, theirs = ([token for token, _ in pairs] for pairs in found)
    best = logits.argmax(-1).tolist()
    errors["top_tokens_equal_to_fp32"] = sum(a == b for a, b in zip(top, best, strict=True)) / size
    errors["reference_top_tokens_equal"] = sum(a == b for a, b in zip(theirs, best, strict=True)) / size
    return errors


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def timed(forward: BlockForward, rows: list[Row], repeats: int) -> dict[str, Any]:
    device = forward.device
    for _ in range(2):  # the first of a shape captures it
        forward.run(rows, ROW_TOKENS)
    line = {"ours_ms": min(wall_ms(lambda: forward.run(rows, ROW_TOKENS), device, repeats) for _ in range(2))}
    replay = forward.captured(rows)
    line["graph_ms"] = None if replay is None else min(event_ms(replay, device, repeats) for _ in range(2))
    return line


def alone(model: Model, tokens: int, predictions: int, repeats: int) -> float:
    run = products.products(model, tokens, predictions)
    return min(event_ms(run, model.device, repeats) for _ in range(2))


def kv_bytes(model: Model, positions: int) -> int:
    spec = model.spec
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * positions * model.dtype.itemsize


def denoise_lines(model: Model, stored: int, copy: float, repeats: int) -> list[dict]:
    """Forwards of one block behind a stored prefix, which is random memory: only its bytes matter."""
    size, lines = model.spec.block_size, []
    text = new_text(model, stored, 2 * size)
    forward = BlockForward(model, text.pool)
    forward.run(text.blocks(0, stored, size), ROW_TOKENS)
    stop = stored + size
    everything = range(stored, stop)
    for branches in BRANCHES:
        rows = []
        for index, pages in enumerate(text.scratch(stored, branches)):
            row = text.row(stored, stop, stop, everything)
            rows.append(row._replace(pages=pages, ids=[*row.ids[:-1], index]))
        line = {"forward": "denoise", "branches": branches, "stored": stored, "tokens": branches * size}
        line |= timed(forward, rows, repeats) | {"products_ms": alone(model, *[branches * size] * 2, repeats)}
        lines.append(line | {"kv_ms": kv_bytes(model, stored) / copy / 1e6})
    rows = [text.row(stored, stop, stop), text.row(stop, stop + size, stop + size, range(stop, stop + size))]
    line = {"forward": "fused", "branches": 1, "stored": stored, "tokens": 2 * size}
    line |= timed(forward, rows, repeats) | {"products_ms": alone(model, 2 * size, size, repeats)}
    lines.append(line | {"kv_ms": kv_bytes(model, stored) / copy / 1e6})
    text.release()
    return lines


def prefill_lines(model: Model, length: int, repeats: int) -> list[dict]:
    text, lines = new_text(model, length, 0), []
    forward = BlockForward(model, text.pool)
    for size in (model.spec.block_size, 4):
        rows = text.blocks(0, length, size)
        line = {"forward": "prefill", "block_size": size, "tokens": length}
        lines.append(line | timed(forward, rows, repeats))
        lines[-1]["products_ms"] = alone(model, length, 1, repeats)
    for share in FOUND:
        size = model.spec.block_size
        first = int(share * length) // size * size
        line = {"forward": "found", "share": share, "tokens": length - first}
        lines.append(line | timed(forward, text.blocks(first, length, size), repeats))
    text.release()
    return lines


def targets(lines: list[dict]) -> list[dict]:
    found = []
    for line in lines:
        name = f"{line['model']}: {line['forward']} of {line['tokens']} tokens"
        if line["forward"] == "denoise" and line["branches"] == 1 and line["graph_ms"]:
            found.append(target(f"{name}, over products and K/V", line["over_floor"], 1.12))
    return found


def show(line: dict) -> str:
    more = ", ".join(
        f"{name} {line[name]}" for name in ("branches", "stored", "block_size", "share") if name in line
    )
    times = ", ".join(f"{name} {line[name]:.3f}" for name in line if name.endswith("_ms") and line[name])
    return f"{line['model']:16} {line['forward']:8} {line['tokens']:5} tokens, {more}: {times}"


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "block_steps", ["sdar-8b", "fast-dllm-v2-7b"])
    arguments.add_argument("--stored", type=int, default=4096)
    arguments.add_argument("--prompt", type=int, default=4096)
    arguments.add_argument("--repeats", type=int, default=9)
    options = arguments.parse_args()
    device = device_of(options)
    limits = ceilings(device, DTYPES[options.dtype])
    begun, lines, checks = time.perf_counter(), [], {}
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        checks[name] = rounded(verify(model, min(options.prompt, 256)), 6)
        print(name, checks[name], flush=True)
        measured = denoise_lines(model, options.stored, limits["copy_gb_per_s"], options.repeats)
        measured += prefill_lines(model, options.prompt, options.repeats)
        for line in measured:
            line["model"] = name
            if "kv_ms" in line:
                ours = line["graph_ms"] or line["ours_ms"]
                line["over_floor"] = ours / (line["products_ms"] + line["kv_ms"])
            lines.append(rounded(line))
            print(show(line), flush=True)
        del model
        clean(device)
    write_report(
        options,
        device,
        seconds=round(time.perf_counter() - begun, 1),
        ceilings=limits,
        checks=checks,
        targets=targets(lines),
        lines=lines,
    )


if __name__ == "__main__":
    main()
