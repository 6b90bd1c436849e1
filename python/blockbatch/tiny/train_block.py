"""Train the built-in block-causal model: `python -m blockbatch.tiny.train_block --out FOLDER`.

The problems, the tokenizer and the optimizer are those of `train`; the architecture is SDAR's, the attention
bidirectional inside a block and causal across blocks. Training sees single problems and texts of several, up
to 1536 tokens. It takes about seven minutes of an H100 in all and writes a HuggingFace SDAR folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockbatch.tasks.built_in import DrawnProblem
from blockbatch.tasks.built_in.several import draw_texts
from blockbatch.tiny.block_corpus import LENGTHS, LONGEST, BlockSampler, RowBuilder
from blockbatch.tiny.block_evaluate import THRESHOLD, evaluate_blocks, evaluate_texts, text_tokens
from blockbatch.tiny.block_export import export_block
from blockbatch.tiny.block_masking import draw_noise, draw_slots
from blockbatch.tiny.block_model import BlockModelShape, BlockTrainModel
from blockbatch.tiny.calibrate import family_mean
from blockbatch.tiny.masking import reveal_confident
from blockbatch.tiny.tokenizer import EOS, MASK, load_tokenizer
from blockbatch.tiny.train import draw_problems, train

_TOKEN_UNIT = 2 * 3072  # twice every length divides it, so all steps have exactly the same number of tokens
_CANVAS = 256  # of a single problem
_TEXTS = ((4, 768), (12, LONGEST))  # problems a text, and its canvas
_TEMPERATURES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
_TOLERANCE = 0.01


def next_token_loss(model: BlockTrainModel, tokens: Tensor, content_ends: Tensor) -> Tensor:
    """Loss of prompt, answer and the first EOS, each token from those before it."""
    position = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return model.next_token_loss(tokens, (position < content_ends[:, None]).float())


def noisy_loss(
    model: BlockTrainModel,
    tokens: Tensor,
    prompt_ends: Tensor,
    content_ends: Tensor,
    mask: int,
    generator: torch.Generator,
    own: bool,
) -> Tensor:
    """Loss of the masked positions of noisy blocks, as many tokens as the clean ones of `tokens`.

    With `own`, some that the model is sure of are revealed first.
    """
    size = model.shape.block_size
    slots = draw_slots(prompt_ends, content_ends, tokens.shape[1] // size, size, generator)
    targets = tokens.gather(1, slots.positions)
    masks = draw_noise(slots, content_ends, size, generator)
    if own:
        noisy = torch.where(masks.masked.view(targets.shape), mask, targets)
        top, confidence = model.predict_noisy(tokens, noisy, slots)
        right = (top == targets).view(-1, size)
        masks = reveal_confident(masks, right, confidence.view(-1, size), generator)
    noisy = torch.where(masks.masked.view(targets.shape), mask, targets)
    return model.loss(tokens, noisy, slots, targets, masks.weights.view(targets.shape))


def warm_up(model: BlockTrainModel, tokens: int, mask: int, generator: torch.Generator) -> None:
    """Compile every piece, and try the longest rows, before the clock of the training starts."""
    device, size = model.embedding.device, model.shape.block_size
    for length in (min(LENGTHS), LONGEST):
        rows = tokens // 2 // length
        clean = torch.zeros((rows, length), dtype=torch.int64, device=device)
        ends = torch.full((rows,), size, dtype=torch.int64, device=device)
        noisy_loss(model, clean, ends, ends + size, mask, generator, True).backward()
    short = torch.zeros((tokens // _CANVAS, _CANVAS), dtype=torch.int64, device=device)
    next_token_loss(model, short, torch.full((len(short),), size, device=device)).backward()
    model.predict(short)
    model.zero_grad(set_to_none=True)


def quick_look(model: BlockTrainModel, problems: list[DrawnProblem], tokens: int) -> dict[str, Any]:
    """Accuracy by family and mean forwards on a few held-out problems."""
    tokenizer = load_tokenizer()
    result = evaluate_blocks(model, tokenizer, problems, tokens=tokens, canvas=_CANVAS, threshold=THRESHOLD)
    accuracy = {key: value for key, value in result["accuracy"].items() if "/" not in key}
    return {"accuracy": accuracy, "forwards": result["mean_forwards"]}


@torch.no_grad()
def fit_temperature(model: BlockTrainModel, problems: list[DrawnProblem], tokens: int) -> dict[str, Any]:
    """Divide the head by the lowest temperature at which the threshold costs at most a point of accuracy.

    The measure is one token a forward. `problems` are held out from training and from the final test. If no
    temperature suffices, the highest is taken. Returns what was measured; `model.head` is written.
    """
    tokenizer, sizes = load_tokenizer(), {"tokens": tokens, "canvas": _CANVAS}
    aim = family_mean(evaluate_blocks(model, tokenizer, problems, threshold=None, **sizes)) - _TOLERANCE
    trained = model.head.clone()
    tried = []
    for temperature in _TEMPERATURES:
        model.head.copy_(trained / temperature)
        result = evaluate_blocks(model, tokenizer, problems, threshold=THRESHOLD, **sizes)
        accuracy = family_mean(result)
        tried.append({"temperature": temperature, "accuracy": accuracy, "forwards": result["mean_forwards"]})
        print(json.dumps(tried[-1]), flush=True)
        if accuracy >= aim:
            break
    return {"temperature": temperature, "aim": aim, "tried": tried}


def measure(model: BlockTrainModel, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy on unseen problems: single ones by both rules, and texts of several by the threshold rule."""
    tokenizer = load_tokenizer()
    problems = draw_problems(arguments.test_split, arguments.test_problems)
    results = []

    def add(result: dict[str, Any], begin: float) -> None:
        shown = {key: value for key, value in result.items() if key not in ("wrong", "problems")}
        print(json.dumps({**shown, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
        results.append(result)

    for threshold in (None, THRESHOLD):
        begin = time.monotonic()
        sizes = {"tokens": arguments.tokens, "canvas": _CANVAS, "threshold": threshold}
        add(evaluate_blocks(model, tokenizer, problems, **sizes), begin)
    for count, canvas in _TEXTS:
        begin = time.monotonic()
        texts = [
            text for text in draw_texts(problems, count, seed=7) if text_tokens(tokenizer, text) < canvas
        ]
        texts = texts[: arguments.test_texts]
        sizes = {"tokens": arguments.tokens, "canvas": canvas, "threshold": THRESHOLD}
        if texts:
            add(evaluate_texts(model, tokenizer, texts, **sizes), begin)
    return results


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="limit of the training loop; the rate falls towards it"
    )
    parser.add_argument(
        "--steps", type=int, default=100_000, help="limit in steps, whichever comes first; repeatable"
    )
    parser.add_argument("--problems", type=int, default=1_200_000, help="problems drawn for training")
    parser.add_argument(
        "--tokens", type=int, default=98_304, help=f"tokens per step, a multiple of {_TOKEN_UNIT}"
    )
    parser.add_argument(
        "--causal-part", type=float, default=0.05, help="share of next-token training at the start"
    )
    parser.add_argument(
        "--several-from", type=float, default=0.15, help="progress from which texts of several problems come"
    )
    parser.add_argument(
        "--own-from", type=float, default=0.4, help="progress from which masks follow the model's own order"
    )
    parser.add_argument("--muon-rate", type=float, default=0.012)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden", "block_size"):
        default = getattr(BlockModelShape, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--test-split", choices=("held_out", "test"), default="test")
    parser.add_argument("--test-problems", type=int, default=60, help="problems per kind, 0 for no test")
    parser.add_argument("--test-texts", type=int, default=64, help="texts of several problems, each length")
    parser.add_argument("--report", type=int, default=100, help="steps between lines of the loss curve")
    parser.add_argument("--look", type=int, default=1500, help="steps between decodes of held-out problems")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(given)
    if arguments.tokens <= 0 or arguments.tokens % _TOKEN_UNIT:
        parser.error(f"--tokens must be a positive multiple of {_TOKEN_UNIT}, got {arguments.tokens}")
    if arguments.block_size not in (4, 8, 16, 32):
        parser.error(f"--block-size must be 4, 8, 16 or 32, got {arguments.block_size}")
    return arguments


def main(given: list[str] | None = None) -> None:
    arguments = parse_arguments(given)
    begin = time.monotonic()
    builder = RowBuilder(arguments.problems, arguments.seed)
    tokenizer = load_tokenizer()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(arguments.seed)
    shape = BlockModelShape(
        vocabulary=tokenizer.get_vocab_size(),
        **{
            name: getattr(arguments, name)
            for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden", "block_size")
        },
    )
    model = BlockTrainModel(
        shape, compiled=on_gpu, dtype=torch.bfloat16 if on_gpu else torch.float32, longest=LONGEST
    ).to(device)
    eos, mask = tokenizer.token_to_id(EOS), tokenizer.token_to_id(MASK)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    if on_gpu:
        warm_up(model, arguments.tokens, mask, generator)
    rows = builder.result()
    sampler = BlockSampler(rows, device, eos, arguments.seed)
    parameters = sum(p.numel() for p in model.parameters())
    ready = time.monotonic() - begin
    print(
        f"{parameters} parameters, {len(rows.prompt_ends)} rows of {len(rows.tokens)} tokens, "
        f"plans {sampler.plans}, ready in {ready:.0f} s",
        flush=True,
    )
    looks: list[dict[str, Any]] = []
    few = draw_problems("held_out", 5)

    def look(step: int) -> None:
        if step % arguments.look == 0:
            looks.append({"step": step, **quick_look(model, few, arguments.tokens)})
            print(json.dumps(looks[-1]), flush=True)

    def loss_of(step: int, progress: float) -> Tensor:
        single = progress < arguments.several_from
        if progress < arguments.causal_part:
            tokens, _, content_ends = sampler.draw(arguments.tokens, single=single)
            return next_token_loss(model, tokens, content_ends)
        own = progress > arguments.own_from and step % 3 == 0
        batch = sampler.draw(arguments.tokens // 2, single=single)
        return noisy_loss(model, *batch, mask, generator, own)

    curve, steps = train(model, loss_of, arguments, look)
    record: dict[str, Any] = {
        "parameters": parameters,
        "arguments": {**vars(arguments), "out": arguments.out.name},
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": len(rows.prompt_ends),
        "steps": steps,
        "tokens": steps * arguments.tokens,
        "longest_row": LONGEST,
        "loss": curve,
        "looks": looks,
        "seconds": {"preparation": round(ready, 1), "training": round(time.monotonic() - begin - ready, 1)},
    }
    export_block(model, tokenizer, arguments.out, record)  # whatever happens in the tests below
    if not arguments.test_problems:
        return
    held_out = draw_problems("held_out", max(1, arguments.test_problems // 2))
    record["calibration"] = fit_temperature(model, held_out, arguments.tokens)
    # The checkpoint holds bf16 weights, so that is what is measured.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    export_block(model, tokenizer, arguments.out, record)
    results = measure(model, arguments)
    wrong = [{**result, "wrong": result.pop("wrong")} for result in results]
    record["evaluation"] = {"split": arguments.test_split, "results": results}
    record["seconds"]["total"] = round(time.monotonic() - begin, 1)
    export_block(model, tokenizer, arguments.out, record)
    (arguments.out / "wrong_answers.json").write_text(json.dumps(wrong, indent=1) + "\n")


if __name__ == "__main__":
    main()
