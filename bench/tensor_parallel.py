"""A model on several GPUs of a host beside one: block steps, refreshes, and what travels between the GPUs.

    torchrun --nproc-per-node 2 bench/tensor_parallel.py [--shapes llada-8b] [--tokens 32 128 252]

Every rank makes the whole model of random weights, and its part of it. First each step and each refresh by
the ranks is checked: final hidden states, top tokens and confidences against fp32 arithmetic of the whole
model, with the distance of the reference backend on one GPU as the measure, and all ranks must hold the same
state, bit for bit. Then, in turns on all GPUs at the same time, medians by events on rank 0:

    ranks_ms        a step (a CUDA graph), or a refresh of so many different rows of `--length` positions
    two_lanes_ms    a refresh whose rows are at work two at a time (blockbatch/parallel/lanes.py)
    whole_rows_ms   a refresh whose rows are dealt out whole to the GPUs, which hold all weights for it
    one_ms          the same by the whole model on one GPU
    products_ms     the matrix products of a rank alone, by cuBLAS, in a CUDA graph
    all_reduce_us   of one all-reduce of [tokens, hidden_size] among many in a graph, by each way there is:
                    "one_shot" and "two_shot" of symmetric memory (with the copy into it), NCCL
    sum_and_norm_us an all-reduce and the norm behind it: "two_steps", and "as_called" by the layers (in one
                    kernel, where there is one)
    head_us         the LM head of as many predictions, parts merged, and on one GPU the whole; "_drawn": of
                    tokens that are drawn, for which all logits travel
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from cases import StepCase
from products import products
from random_models import DTYPES, SHAPES, quantized, random_model
from rank_heads import heads
from refresh import RefreshCase
from step_latency import BLOCK_SIZES
from timing import clean, event_ms, in_turns, parser, rounded, target, write_report
from torch import Tensor
from verify import Hidden, Wrong, check_hidden, check_predictions, hidden_states
from whole_rows import by_whole_rows

import blockbatch_kernels as bbk
from blockbatch.decoding.graph_pool import capture
from blockbatch.models import Model, transformer
from blockbatch.models.quantized_weights import QUANTIZATIONS, QuantizedWeight
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import (
    TransformerWeights,
    allocate,
    layer_destinations,
    model_destinations,
    quantization_of,
)
from blockbatch.parallel import RankShare
from blockbatch.parallel.digest import StateDigest
from blockbatch.parallel.group import device_of_rank
from blockbatch.parallel.shards import Shard
from blockbatch.parallel.transport import NcclTransport, SymmetricTransport

TOKENS = (32, 128, 252)
# Sums of whole rows travel at these sizes.
ROW_TOKENS = (1280, 2048)
REDUCTIONS = 64  # in a step of LLaDA-8B


def part_of(weights: TransformerWeights, spec: ModelSpec, shard: Shard) -> TransformerWeights:
    """A rank's part of weights in memory, as `load_weights` reads it from files."""
    embedding, kind = weights.embedding, quantization_of(weights)
    part = allocate(shard.local_spec, embedding.device, embedding.dtype, shard.vocabulary, kind)
    places = list(model_destinations(spec).values())
    for layer in range(spec.num_layers):
        places += layer_destinations(spec, layer).values()
    for place in places:
        mine = shard.cut(place)
        rows = slice(mine.first_row, mine.first_row + mine.stop - mine.start)
        written, whole = mine.rows(part), place.rows(weights)[rows]
        if isinstance(written, QuantizedWeight):
            written.scale.copy_(whole.scale)
            written, whole = written.values, whole.values
        if written.dim() > 1:
            whole = whole[:, mine.first_column :][:, : written.shape[1]]
        written.copy_(whole)
    return part


class Pair:
    """The same forward by one process and by all ranks, from the same state.

    Args:
        make: the case of a model.
    """

    def __init__(self, one: Model, ranks: Model, make: Callable[[Model], Any]) -> None:
        self.one, self.ranks, self.shard = make(one), make(ranks), ranks.share.shard
        mine, theirs = self.one.batch, self.ranks.batch
        for field in fields(mine.state):
            getattr(theirs.state, field.name).copy_(getattr(mine.state, field.name))
        theirs.plan.host_part().copy_(mine.plan.host_part())
        theirs.plan.predict.copy_(mine.plan.predict)
        theirs.plan.query_position.copy_(mine.plan.query_position)
        theirs.cache.page_table.copy_(mine.cache.page_table)
        theirs.cache.kv.copy_(self.heads_of(mine.cache.kv))
        self.ranks.plan = self.one.plan
        self.ranks.snapshot = type(self.ranks.snapshot)(theirs)

    def heads_of(self, kv: Tensor) -> Tensor:
        """This rank's part of a whole cache."""
        count = self.shard.local_spec.num_kv_heads
        first = self.shard.rank * self.shard.spec.num_kv_heads // self.shard.size
        return kv[..., first : first + count, :]

    def hidden(self) -> Tensor:
        """Final hidden states of the forward by all ranks."""
        case = self.ranks
        model, batch = case.model, case.batch
        packed = bbk.pack_windows(
            batch.state,
            batch.plan,
            batch.cache.page_table,
            page_size=batch.cache.page_size,
            capacity=case.tokens,
            predict_capacity=case.predictions,
            prediction_offset=model.spec.prediction_offset,
            backend=batch.backend,
        )
        return transformer.forward(
            model.spec,
            model.weights,
            transformer.rope_table(model.spec, model.device),
            packed,
            batch.cache.kv,
            batch.cache.page_table,
            batch.seqlens_k,
            distinct_rows=batch.cache.distinct_rows,
            backend=model.backend,
            all_reduce_norm=model.share.all_reduce_norm,
        )[: case.tokens].clone()

    def check(self, reference_error: float | None = None) -> dict[str, Any]:
        """Raises `Wrong` if the ranks' forward is further from fp32 arithmetic than its dtype explains.

        Args:
            reference_error: see `check_hidden`; then one process's hidden states are the measure.
        """
        group, dtype = self.ranks.model.share.group, self.ranks.model.dtype
        for case in (self.one, self.ranks):
            case.snapshot.restore()
            if isinstance(case, RefreshCase):
                case.batch.cache.prepare(case.batch.plan)
        against_one = reference_error is not None  # for many rows the reference takes longer than all else
        found = hidden_states(self.one, with_truth=not against_one, with_reference=not against_one)
        ours = self.hidden()
        theirs = found.ours if against_one else found.reference
        hidden = Hidden(ours, theirs, found.truth, found.predict_index, found.predict_target)
        checks = check_hidden(hidden, dtype, reference_error)
        self.ranks.snapshot.restore()
        self.ranks.run()
        state = self.ranks.batch.state
        if found.truth is not None:
            results = (value.flatten()[found.predict_target] for value in (state.top_token, state.confidence))
            checks |= check_predictions(self.one, hidden, *results)
        group.agree("the state behind a checked forward", int(StateDigest(state).compute()))
        self.ranks.snapshot.restore()
        self.one.snapshot.restore()
        return checks | {"same_state_on_all_ranks": True}

    def same_as_one_lane(self, lanes: int) -> str:
        """Raises `Wrong` unless a refresh by two lanes leaves the state of one by so many, bit for bit."""
        share, found = self.ranks.model.share, []
        most = share.most_lanes
        for share.most_lanes in (lanes, most, most):
            self.ranks.snapshot.restore()
            self.ranks.run()
            found.append(int(StateDigest(self.ranks.batch.state).compute()))
        self.ranks.snapshot.restore()
        if len(set(found)) > 1:
            raise Wrong("two lanes: expected the state of one, got another")
        return "the same state as by one"


def measure(pair: Pair, tokens: int, predictions: int, repeats: int) -> dict[str, Any]:
    """Times of a pair in turns; every rank measures, rank 0's count."""
    model = pair.ranks.model
    device = model.device
    alone = None if model.quantization else products(model, tokens, predictions)
    pair.ranks.run()
    pair.one.run()
    runs = [(pair.ranks.run, pair.ranks.snapshot.restore), (pair.one.run, pair.one.snapshot.restore)]
    (ranks_ms, spread), (one_ms, one_spread), *rest = in_turns(
        [*runs, *([(alone, None)] if alone else [])], device, repeats
    )
    return {
        "ranks_ms": ranks_ms,
        "ranks_spread": spread,
        "one_ms": one_ms,
        "one_spread": one_spread,
        "times_faster": one_ms / ranks_ms,
        "products_ms": rest[0][0] if rest else None,
    }


def transports(share: RankShare, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Ways to add up a tensor over all ranks, by name."""
    if device.type == "cpu":
        return {"gloo": share.group.all_reduce}
    ways = {"nccl": NcclTransport(dist.new_group(backend="nccl"), device).all_reduce}
    if share.group.transport == "symmetric":
        memory = SymmetricTransport(dist.new_group(backend="gloo"), device, dtype)
        ways["one_shot"] = lambda x: memory.sum_of(x.view(-1), two_shot=False)
        ways["two_shot"] = lambda x: memory.sum_of(x.view(-1), two_shot=True)
    return ways


def microseconds(share: RankShare, device: torch.device, name: str, once: Callable[[], Any]) -> float:
    """Of one call among many in a CUDA graph, on all ranks at the same time."""

    def run() -> None:
        for _ in range(REDUCTIONS):
            once()

    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph, kept, _ = capture(run, device, None)  # beside NCCL's own thread
        run = graph.replay
    taken = 1e3 * min(event_ms(run, device, 7) for _ in range(2)) / REDUCTIONS
    share.group.exchange(f"the end of timing {name}")
    return taken


def reductions(share: RankShare, model: Model, tokens: int, ways: dict[str, Callable]) -> dict[str, float]:
    """Microseconds of one all-reduce among many, by each way."""
    x = torch.randn(tokens, model.spec.hidden_size, device=model.device).to(model.dtype)
    return {
        name: microseconds(share, model.device, name, lambda way=way: way(x)) for name, way in ways.items()
    }


def norms(share: RankShare, model: Model, tokens: int) -> dict[str, float]:
    """Microseconds of a sum with the norm behind it: as two steps, and as the layers call it."""
    group, weight = share.group, model.weights.final_norm
    x = torch.randn(tokens, len(weight), device=model.device).to(model.dtype)
    residual, options = torch.zeros_like(x), dict(eps=1e-5, backend=model.backend)
    norm = bbk.rms_norm_fp8 if model.quantization else bbk.rms_norm

    def two_steps() -> Any:
        return norm(group.all_reduce(x), weight, residual=residual, **options)

    def as_called() -> Any:
        return group.all_reduce_norm(x, weight, residual, quantized=bool(model.quantization), **options)

    return {
        name: microseconds(share, model.device, name, once)
        for name, once in (("two_steps", two_steps), ("as_called", as_called))
    }


def lines_of(name: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype, spec, length = DTYPES[options.dtype], SHAPES[name], options.length
    share = RankShare(spec, device, dtype, transport=options.transport, lanes=2)
    share.most_lanes = 1
    one = random_model(name, device, dtype, backend=options.backend)
    if options.quantization:
        one = quantized(one, options.quantization)
    part = part_of(one.weights, spec, share.shard)
    ranks = Model(share.local_spec(spec), part, None, backend=options.backend, name=name, share=share)
    gen_length = min(256, length // 2)
    sizes, error, lines = (length - gen_length, gen_length), None, []
    ways = transports(share, device, dtype)
    for tokens in options.tokens:
        pair = Pair(one, ranks, lambda model, tokens=tokens: StepCase(model, BLOCK_SIZES[tokens], *sizes))
        checks = pair.check()
        error = checks["reference_hidden_error"]
        line = {"model": name, "kind": "step", "tokens": tokens, "length": length, "ranks": share.size}
        line |= measure(pair, tokens, pair.one.predictions, options.repeats)
        line["all_reduce_us"] = reductions(share, ranks, tokens, ways)
        line["sum_and_norm_us"] = norms(share, ranks, tokens)
        line["head_us"] = heads(one, ranks, pair.one.predictions)
        lines.append(rounded(line) | {"checks": rounded(checks, 8)})
        show(lines[-1])
        del pair
        clean(device)
    for distinct in options.rows:
        pair = Pair(one, ranks, lambda model, rows=distinct: RefreshCase(model, rows, *sizes))
        checks = pair.check(error)
        line = {"model": name, "kind": "refresh", "rows": distinct, "tokens": pair.one.tokens}
        line |= {"length": length, "ranks": share.size}
        repeats = max(3, options.repeats // 3)
        line |= measure(pair, pair.one.tokens, pair.one.predictions, repeats)
        if share.num_lanes > 1 and distinct > 1:
            share.most_lanes = 2
            checks |= {"two_lanes": pair.same_as_one_lane(1)}
            run = [(pair.ranks.run, pair.ranks.snapshot.restore)]
            ((line["two_lanes_ms"], line["two_lanes_spread"]),) = in_turns(run, device, repeats)
            share.most_lanes = 1
        if distinct >= share.size:
            line |= by_whole_rows(pair, one, error, repeats)
        lines.append(rounded(line) | {"checks": rounded(checks, 8)})
        show(lines[-1])
        del pair
        clean(device)
    for tokens in [] if options.quick else ROW_TOKENS:
        line = {"model": name, "kind": "all_reduce", "tokens": tokens, "ranks": share.size}
        line["sum_and_norm_us"] = norms(share, ranks, tokens)
        lines.append(rounded(line | {"all_reduce_us": reductions(share, ranks, tokens, ways)}))
        show(lines[-1])
    for line in lines:
        line |= {"transport": share.group.transport, "quantization": options.quantization}
    return lines


def show(line: dict[str, Any]) -> None:
    if dist.get_rank():
        return
    kept = (
        "ranks_ms",
        "two_lanes_ms",
        "whole_rows_ms",
        "one_ms",
        "times_faster",
        "products_ms",
        "all_reduce_us",
    )
    kept += ("sum_and_norm_us", "head_us")
    values = ", ".join(f"{name} {line[name]}" for name in kept if name in line)
    print(
        f"{line['model']} {line['kind']} of {line['tokens']} tokens by {line['ranks']}: {values}", flush=True
    )


def targets(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two GPUs are to reach in LLaDA-8B's shape."""
    limits = {
        ("step", 128, None): ("step of 128 tokens by 2 GPUs, ms", 4.3),
        ("step", 128, "fp8"): ("step of 128 tokens by 2 GPUs in fp8, ms", 2.9),
        ("refresh", 6, None): ("refresh of 6 rows by 2 GPUs, ms", 100.0),
    }
    found = []
    for line in lines:
        key = line["kind"], line.get("rows", line["tokens"]), line.get("quantization")
        if (line["model"], line["ranks"]) == ("llada-8b", 2) and key in limits:
            name, limit = limits[key]
            ways = (line[way] for way in ("ranks_ms", "two_lanes_ms", "whole_rows_ms") if way in line)
            found.append(target(name, min(ways), limit))
    return found


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "tensor_parallel", ["llada-8b"])
    arguments.add_argument("--tokens", nargs="*", type=int, choices=BLOCK_SIZES, default=TOKENS)
    arguments.add_argument("--rows", nargs="*", type=int, choices=range(1, 7), default=(1, 2, 5, 6))
    arguments.add_argument("--length", type=int, default=1280)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--quantization", choices=QUANTIZATIONS)
    arguments.add_argument("--transport", choices=("symmetric", "nccl"))
    options = arguments.parse_args()
    device = torch.device(device_of_rank(options.ranks, options.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lines = [line for name in options.shapes for line in lines_of(name, device, options)]
    if dist.get_rank() == 0:
        write_report(options, device, ranks=options.ranks, targets=targets(lines), lines=lines)
    dist.barrier()


if __name__ == "__main__":
    main()
