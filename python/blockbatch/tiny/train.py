"""Train the built-in model: `python -m blockbatch.tiny.train --out FOLDER`.

Draws the problems, trains on one GPU (about 13 minutes of an H100 in all), decodes unseen problems and writes
a HuggingFace LLaDA folder with a training record. Optional next-token training at the start teaches copying
and arithmetic with a signal at every position; masked training in block-wise states follows.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockbatch.tasks.built_in import FAMILIES, KINDS, DrawnProblem, generate_problems
from blockbatch.tiny.block_model import BlockTrainModel
from blockbatch.tiny.calibrate import fit_temperature
from blockbatch.tiny.corpus import Corpus, CorpusBuilder
from blockbatch.tiny.evaluate import evaluate
from blockbatch.tiny.export import export
from blockbatch.tiny.masking import draw_masks, reveal_confident
from blockbatch.tiny.tokenizer import MASK, load_tokenizer
from blockbatch.tiny.train_model import ModelShape, Muon, TrainModel

# Canvas lengths with their share of the tokens. "Tight" steps take rows that nearly fill the canvas; "loose"
# ones take any row, so that the model is at home with a long EOS fill.
_TIGHT = (64, 96, 128, 192, 256)
_LOOSE = {256: 0.08, 384: 0.10, 512: 0.06, 768: 0.03}
_TOKEN_UNIT = 1536  # every canvas length divides it, so all steps have exactly the same number of tokens
_EVAL_CANVAS = 384

Trained = TrainModel | BlockTrainModel


class RowSampler:
    """Rows of the corpus on the device, sorted by length; chooses each step's canvas length and rows."""

    def __init__(self, corpus: Corpus, device: torch.device, tokens_per_step: int, seed: int) -> None:
        order = np.argsort(corpus.content_ends, kind="stable")
        ends = corpus.content_ends[order]
        self.tokens = torch.from_numpy(corpus.tokens[order]).to(device)
        self.prompt_ends = torch.from_numpy(corpus.prompt_ends[order]).to(device)
        self.content_ends = torch.from_numpy(ends).to(device)
        self.tokens_per_step = tokens_per_step
        self.eos = int(corpus.tokens[0, -1])
        self.generator = torch.Generator(device).manual_seed(seed)
        self._chooser = np.random.default_rng(seed)
        # (canvas length, first row, end row) with the probability of a step
        self.plans: list[tuple[int, int, int]] = []
        shares = []
        low = 0
        for length in _TIGHT:
            high = int(np.searchsorted(ends, length - 1))  # at least one EOS
            if high > low:
                self.plans.append((length, low, high))
                shares.append((high - low) * length)
            low = high
        shares = [share / sum(shares) * (1 - sum(_LOOSE.values())) for share in shares]
        self.plans += [(length, 0, int(np.searchsorted(ends, length - 1))) for length in _LOOSE]
        shares += list(_LOOSE.values())
        self._shares = np.array(shares) / sum(shares)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [rows, length] int64, prompt_ends [rows], content_ends [rows]; rows * length is constant."""
        length, low, high = self.plans[self._chooser.choice(len(self.plans), p=self._shares)]
        rows = self.tokens_per_step // length
        index = torch.randint(low, high, (rows,), device=self.tokens.device, generator=self.generator)
        tokens = torch.full((rows, length), self.eos, device=self.tokens.device)
        width = min(length, self.tokens.shape[1])
        tokens[:, :width] = self.tokens[index, :width].long()
        return tokens, self.prompt_ends[index], self.content_ends[index]


def next_token_loss(model: TrainModel, tokens: Tensor, content_ends: Tensor) -> Tensor:
    """Loss of predicting each token of prompt and answer, and the first EOS, from those before it."""
    position = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return model.loss(
        tokens, tokens.roll(-1, dims=1), (position < content_ends[:, None]).float(), causal=True
    )


def masked_loss(
    model: TrainModel,
    tokens: Tensor,
    prompt_ends: Tensor,
    content_ends: Tensor,
    mask: int,
    sampler: RowSampler,
    own: bool,
) -> Tensor:
    """Loss of the masked positions; with `own`, some that the model is sure of are revealed first."""
    masks = draw_masks(prompt_ends, content_ends, tokens.shape[1], sampler.generator)
    if own:
        top, confidence = model.predict(torch.where(masks.masked, mask, tokens))
        masks = reveal_confident(masks, top == tokens, confidence, sampler.generator)
    return model.loss(torch.where(masks.masked, mask, tokens), tokens, masks.weights)


def learning_rate_factor(progress: float, constant_until: float = 0.35) -> float:
    """A short rise, a constant part and a linear fall to 0; progress from 0 to 1."""
    return min(1.0, progress / 0.01 + 0.02) * min(1.0, (1.0 - progress) / (1.0 - constant_until))


def train(
    model: Trained,
    loss_of: Callable[[int, float], Tensor],
    arguments: argparse.Namespace,
    look: Callable[[int], None] = lambda step: None,
) -> tuple[list[dict[str, float]], int]:
    """Run the loop until `arguments.steps` or `arguments.minutes`; returns the loss curve and the steps.

    `loss_of(step, progress)` draws a batch and returns its loss; `look(step)` is called after each report.
    """
    muon, adam = optimizers(model)
    curve: list[dict[str, float]] = []
    total, count = torch.zeros((), device=model.embedding.device), 0
    safe = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = 1.0
    begin = time.monotonic()
    step = 0
    while True:
        seconds = time.monotonic() - begin
        progress = max(step / arguments.steps, seconds / 60 / arguments.minutes)
        if progress >= 1:
            break
        loss = loss_of(step, progress)
        loss.backward()
        factor = scale * learning_rate_factor(progress)
        muon.step(arguments.muon_rate * factor)
        for group in adam.param_groups:
            group["lr"] = arguments.adam_rate * factor
        torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
        adam.step()
        model.zero_grad(set_to_none=True)
        total, count, step = total + loss.detach(), count + 1, step + 1
        if step % arguments.report == 0:
            mean = float(total) / count
            curve.append(
                {"step": step, "seconds": round(time.monotonic() - begin, 1), "loss": round(mean, 4)}
            )
            print(json.dumps(curve[-1]), flush=True)
            total, count = torch.zeros_like(total), 0
            with torch.no_grad():
                size = sum(parameter.abs().sum() for parameter in model.parameters())
                if math.isfinite(mean) and math.isfinite(float(size)):
                    for name, parameter in model.named_parameters():
                        safe[name].copy_(parameter)
                else:
                    scale /= 2
                    print(f"diverged: back to the last good weights, rates x {scale}", flush=True)
                    for name, parameter in model.named_parameters():
                        parameter.copy_(safe[name])
                    muon, adam = optimizers(model)
            look(step)
    return curve, step


def optimizers(model: Trained) -> tuple[Muon, torch.optim.Adam]:
    """Muon for the layers' matrices, Adam for embedding, head and norms; both without history."""
    others = [p for name, p in model.named_parameters() if name not in model.matrices]
    adam = torch.optim.Adam(others, betas=(0.9, 0.95), eps=1e-10, fused=model.embedding.is_cuda)
    return Muon([getattr(model, name) for name in model.matrices]), adam


def warm_up(model: TrainModel, tokens_per_step: int) -> None:
    """Compile every piece before the clock of the training starts."""
    for length in (128, 512):
        tokens = torch.zeros(
            (tokens_per_step // length, length), dtype=torch.int64, device=model.embedding.device
        )
        model.predict(tokens)
        model.loss(tokens, tokens, torch.ones(tokens.shape, device=tokens.device)).backward()
    model.zero_grad(set_to_none=True)


def draw_problems(split: str, count: int) -> list[DrawnProblem]:
    """About `count` problems of every kind."""
    return [p for f in FAMILIES for p in generate_problems(f, split, count * len(KINDS[f]), seed=7)]


def measure(model: TrainModel, arguments: argparse.Namespace, split: str, count: int) -> list[dict[str, Any]]:
    """Accuracy on unseen problems: one token per step, and the threshold rule with small and large blocks."""
    tokenizer = load_tokenizer()
    problems = draw_problems(split, count)
    results = []
    for block_size, threshold in ((32, None), (8, 0.9), (32, 0.9), (128, 0.9)):
        begin = time.monotonic()
        result = evaluate(
            model,
            tokenizer,
            problems,
            rows=arguments.tokens // _EVAL_CANVAS,
            canvas=_EVAL_CANVAS,
            block_size=block_size,
            threshold=threshold,
        )
        shown = {key: value for key, value in result.items() if key not in ("wrong", "problems")}
        print(json.dumps({**shown, "seconds": round(time.monotonic() - begin, 1)}), flush=True)
        results.append(result)
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=10.7, help="limit of the training loop; the rate falls towards it"
    )
    parser.add_argument("--steps", type=int, default=100_000, help="limit in steps, whichever comes first")
    parser.add_argument("--rows", type=int, default=2_500_000, help="problems drawn for training")
    parser.add_argument(
        "--tokens", type=int, default=98_304, help=f"tokens per step, a multiple of {_TOKEN_UNIT}"
    )
    parser.add_argument(
        "--causal-part", type=float, default=0.05, help="share of next-token training at the start"
    )
    parser.add_argument(
        "--own-from", type=float, default=0.4, help="progress from which masks follow the model's own order"
    )
    parser.add_argument("--muon-rate", type=float, default=0.012)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--mlp-hidden", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--test-split", choices=("held_out", "test"), default="test")
    parser.add_argument("--test-problems", type=int, default=60, help="problems per kind, 0 for no test")
    parser.add_argument("--report", type=int, default=100, help="steps between lines of the loss curve")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.tokens <= 0 or arguments.tokens % _TOKEN_UNIT:
        parser.error(f"--tokens must be a positive multiple of {_TOKEN_UNIT}, got {arguments.tokens}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    begin = time.monotonic()
    builder = CorpusBuilder(arguments.rows, arguments.seed)
    tokenizer = load_tokenizer()
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    shape = ModelShape(
        vocabulary=tokenizer.get_vocab_size(),
        d_model=arguments.d_model,
        n_layers=arguments.layers,
        n_heads=arguments.d_model // 64,
        mlp_hidden=arguments.mlp_hidden,
    )
    on_gpu = device.type == "cuda"
    model = TrainModel(shape, compiled=on_gpu, dtype=torch.bfloat16 if on_gpu else torch.float32).to(device)
    if on_gpu:
        warm_up(model, arguments.tokens)
    corpus = builder.result()
    sampler = RowSampler(corpus, device, arguments.tokens, arguments.seed)
    parameters = sum(p.numel() for p in model.parameters())
    ready = time.monotonic() - begin
    print(
        f"{parameters} parameters, {len(corpus.tokens)} rows, plans {sampler.plans}, ready in {ready:.0f} s",
        flush=True,
    )
    mask = tokenizer.token_to_id(MASK)

    def loss_of(step: int, progress: float) -> Tensor:
        tokens, prompt_ends, content_ends = sampler.draw()
        if progress < arguments.causal_part:
            return next_token_loss(model, tokens, content_ends)
        own = progress > arguments.own_from and step % 3 == 0
        return masked_loss(model, tokens, prompt_ends, content_ends, mask, sampler, own)

    curve, steps = train(model, loss_of, arguments)
    record = {
        "parameters": parameters,
        "arguments": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": len(corpus.tokens),
        "steps": steps,
        "tokens": steps * arguments.tokens,
        "loss": curve,
        "seconds": {"preparation": round(ready, 1), "training": round(time.monotonic() - begin - ready, 1)},
    }
    if arguments.test_problems:
        record["calibration"] = fit_temperature(
            model,
            tokenizer,
            draw_problems("held_out", arguments.test_problems),
            rows=arguments.tokens // _EVAL_CANVAS,
            canvas=_EVAL_CANVAS,
        )
    # The checkpoint holds bf16 weights, so that is what is measured.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    results = (
        measure(model, arguments, arguments.test_split, arguments.test_problems)
        if arguments.test_problems
        else []
    )
    wrong = {f"block {r['block_size']}, threshold {r['threshold']}": r.pop("wrong") for r in results}
    record["evaluation"] = {"split": arguments.test_split, "canvas": _EVAL_CANVAS, "results": results}
    record["seconds"]["total"] = round(time.monotonic() - begin, 1)
    export(model, tokenizer, arguments.out, record)
    (arguments.out / "wrong_answers.json").write_text(json.dumps(wrong, indent=1) + "\n")


if __name__ == "__main__":
    main()
