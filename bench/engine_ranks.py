"""The engine on several GPUs of a host beside one, and what rank 0's word to the others costs a step.

    torchrun --nproc-per-node 2 bench/engine_ranks.py [--shapes llada-8b] [--clients 1 8 32]

Every rank makes the whole model of random weights, and its part of it. So many requests of the dual cache run
together, each a block of 32 positions a step. Wall-clock medians on rank 0 of the steps without whole rows,
milliseconds:

    ranks_ms     the engine by all ranks
    batch_ms     the same prompts as one batch of `generate` by all ranks, where nobody is told anything
    one_ms       the engine by the whole model on one GPU
    tell_us      of a step of all ranks: until rank 0 has told the others, microseconds
    hear_us      on rank 1: from rank 0's sending to its hearing, by the clock that both have, microseconds

In fp32 requests must end alike by the engine and the batch of all ranks. In half precision `same_canvases`
says whether they do: products of other numbers of rows round apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from random_models import DTYPES, SHAPES, random_model
from tensor_parallel import part_of
from timing import clean, parser, rounded, write_report
from verify import Wrong

import blockbatch
from blockbatch.decoding.choice import method_for
from blockbatch.decoding.engine import Engine
from blockbatch.decoding.session import Session
from blockbatch.models import Model
from blockbatch.parallel import Plans, RankShare
from blockbatch.parallel.group import device_of_rank

CLIENTS = (1, 8, 32)
GEN_LENGTH, BLOCK = 128, 32
CACHE_TOKENS = 32 * 1024


class Words:
    """Times of what rank 0 tells, and of the others' hearing; seconds."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.sent: list[float] = []
        self.heard: list[float] = []
        tell, hear = Plans.tell, Plans.hear

        def timed_tell(plans: Plans, plan: bytes) -> None:
            self.sent.append(time.perf_counter())
            tell(plans, plan)
            self.told.append(time.perf_counter() - self.sent[-1])

        def timed_hear(plans: Plans) -> bytes:
            found = hear(plans)
            self.heard.append(time.perf_counter())
            return found

        Plans.tell, Plans.hear = timed_tell, timed_hear

    def clear(self) -> None:
        for times in (self.told, self.sent, self.heard):
            times.clear()

    def hearing(self, rank: int) -> list[float]:
        """Seconds between rank 0's sending and rank 1's hearing of each plan, on every rank."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.heard if rank else self.sent)
        return [heard - sent for sent, heard in zip(every[0], every[1])]


def by_engine(engine: Engine, prompts: list[list[int]], config: Any) -> tuple[list[list[int]], float]:
    """The canvases, and the median of the steps that hold no whole rows, seconds."""
    requests = [engine.submit(prompt, config) for prompt in prompts]
    times, going = [], True
    while going:
        before, begun = engine.stats().forwards, time.perf_counter()
        going = engine.step()
        after = engine.stats().forwards
        if all(after[phase] == before[phase] for phase in ("init", "refresh")):
            times.append(time.perf_counter() - begun)
    return [request.result.canvas for request in requests], statistics.median(times)


def by_batch(model: Model, prompts: list[list[int]], config: Any) -> tuple[list[list[int]], float]:
    config = config.for_model(model.spec)
    session, times = Session(model, prompts, method_for(model, config), config.gen_length), []
    begun = time.perf_counter()
    while (step := session.step()) is not None:
        if step.phase == "block":
            times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return [session.outcome(index).canvas for index in range(len(prompts))], statistics.median(times)


def lines_of(name: str, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype, spec, lines, words = DTYPES[options.dtype], SHAPES[name], [], Words()
    share = RankShare(spec, device, dtype)
    one = random_model(name, device, dtype, backend=options.backend)
    part = part_of(one.weights, spec, share.shard)
    ranks = Model(share.local_spec(spec), part, None, backend=options.backend, name=name, share=share)
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=GEN_LENGTH, block_size=BLOCK)
    generator = torch.Generator().manual_seed(0)
    for clients in options.clients:
        shape = clients, options.prompt
        prompts = torch.randint(0, spec.mask_token_id, shape, generator=generator).tolist()
        line = {"model": name, "clients": clients, "prompt": options.prompt, "ranks": share.size}
        line["transport"] = share.group.transport
        canvases, seconds = by_batch(ranks, prompts, config)
        line["batch_ms"] = 1e3 * seconds
        limits = dict(max_requests=clients, max_queue=clients, cache_tokens=CACHE_TOKENS)
        engine = Engine(ranks, **limits)
        if share.shard.rank:
            engine.follow()
        else:
            by_engine(engine, prompts, config)  # captures its steps
            words.clear()
            found, seconds = by_engine(engine, prompts, config)
            count = len(words.sent)
            engine.close()
            if found != canvases and dtype == torch.float32:
                raise Wrong("engine by all ranks: expected the canvases of the batch, got others")
            line |= {"ranks_ms": 1e3 * seconds, "same_canvases": found == canvases}
            line["tell_us"] = 1e6 * statistics.median(words.told[:count])
        # Of the others, as many of the last as rank 0 has: the word of the end among them.
        if share.shard.rank:
            share.group.exchange("the plans of an engine", patient=True)
            words.heard[:] = words.heard[-options.latest :]
        else:
            share.group.exchange("the plans of an engine", patient=True)
            words.sent[:] = words.sent[-options.latest :]
        hearing = words.hearing(share.shard.rank)
        words.clear()
        line["hear_us"] = 1e6 * statistics.median(hearing)
        if share.shard.rank == 0:
            engine = Engine(one, **limits)
            by_engine(engine, prompts, config)
            line["one_ms"] = 1e3 * by_engine(engine, prompts, config)[1]
            engine.close()
            print(rounded(line), flush=True)
        del engine
        clean(device)
        share.group.exchange("the next line", patient=True)
        lines.append(rounded(line))
    return lines


def main() -> None:
    arguments = parser(__doc__, "engine_ranks", ["llada-8b"])
    arguments.add_argument("--clients", nargs="*", type=int, default=CLIENTS)
    arguments.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    arguments.add_argument("--latest", type=int, default=64, help="plans whose way is timed")
    arguments.add_argument("--ranks", type=int, default=2)
    options = arguments.parse_args()
    device = torch.device(device_of_rank(options.ranks, options.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lines = [line for name in options.shapes for line in lines_of(name, device, options)]
    if dist.get_rank() == 0:
        write_report(options, device, ranks=options.ranks, lines=lines)
    dist.barrier()


if __name__ == "__main__":
    main()
