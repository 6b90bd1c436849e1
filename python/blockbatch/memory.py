"""What a decode needs of the device's memory, and how many prompts fit at a time."""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple

import torch

import blockbatch_kernels as bbk
from blockbatch import block_memory, devices, kv_cache
from blockbatch.config import DecodeConfig
from blockbatch.decoding import Method
from blockbatch.decoding.batch import most_tokens
from blockbatch.decoding.choice import method_for
from blockbatch.decoding.graph_pool import MAX_GRAPH_TOKENS, pool_bytes
from blockbatch.decoding.graphs import StepGraphs, packed_capacity
from blockbatch.decoding.row_graphs import row_capacity
from blockbatch.decoding.session import ROW_TOKENS
from blockbatch.models import transformer
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.parallel import share_of

# On a GPU prompts share buffers with others of about their length, so that graphs are captured once.
_PROMPT_STEP = 64
# Graphs of several sizes do not fit into each other's memory without a gap.
_GRAPH_SHARE = 2
# Of the matrix library, for the stream of the steps and for the one that captures, and of attention's plan.
_GPU_WORKSPACES = 3 * (32 << 20)
# Records of a position of the generation region, and what the policy makes of one: for itself, and for each
# branch that it is compared with.
_POSITION_BYTES, _PAIR_BYTES = 512, 64


class Needs(NamedTuple):
    """Bytes that a batch takes beside the weights.

    Attributes:
        cache: the K/V cache, allocated once before the first forward; with Dream's published rule also its
            map of probabilities.
        work: activations, logits and partial results of a forward, at most.
        rest: what captured steps hold, workspaces of libraries, the policy's records.
    """

    cache: int
    work: int
    rest: int = 0

    def __str__(self) -> str:
        work = (self.work + self.rest) / 2**20
        return f"K/V cache {self.cache / 2**20:,.0f} MiB, working memory up to {work:,.0f} MiB"


def longest_prompt(device: torch.device, longest: int) -> int:
    """Tokens of prompt that a batch makes room for."""
    return longest if device.type == "cpu" else -(-max(longest, 1) // _PROMPT_STEP) * _PROMPT_STEP


def needs(
    model: Model,
    config: DecodeConfig,
    num_requests: int,
    longest: int,
    *,
    least: bool = False,
    region: int | None = None,
) -> Needs:
    """What a batch of `num_requests` prompts of at most `longest` tokens takes.

    Args:
        region: positions behind a prompt; None: the settings' `gen_length`.
        least: with `max_length="grow"` what the first block takes, rather than the whole text.
    """
    spec, dtype, device = model.spec, model.dtype, model.device
    if is_block_causal(spec):
        return _block_needs(model, config, num_requests, longest, least)
    method: Method = method_for(model, config)
    num_branches, prompt = len(method.block_sizes), longest_prompt(device, longest)
    gen_length = config.gen_length if region is None else region
    rows, length = num_requests * num_branches, prompt + gen_length
    cache = kv_cache.cache_bytes(
        rows,
        length,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=model.kv_dtype,
    )
    if config.policy == "dream_published":
        cache += rows * gen_length * bbk.map_entries(config.block_sizes, gen_length) * 8
    compiled = _compiled(model)
    kinds = dict(compiled=compiled, quantization=model.quantization)
    # Whole rows go in chunks; a block step is one piece, of at least every row's generation region here.
    chunk = min(rows * length, max(length, ROW_TOKENS[device.type]))
    whole = min(rows * length, share_of(model).num_lanes * chunk)
    step = most_tokens(method, num_requests, prompt, gen_length)
    regions = min(rows * length, rows * (gen_length + spec.prediction_offset))
    if device.type == "cuda":
        whole = max(whole, row_capacity(chunk))
    work = transformer.activation_bytes(spec, dtype, max(whole, step, regions), **kinds)
    if (all_weights := share_of(model).whole) is not None:
        tokens = min(rows * length, max(length, ROW_TOKENS[device.type]))
        layer = kv_cache.layer_bytes(all_weights.spec, dtype, rows, tokens)
        dealt = transformer.activation_bytes(all_weights.spec, dtype, tokens, **kinds) + 2 * layer
        work = max(work, dealt)
    rest = rows * gen_length * (_POSITION_BYTES + _PAIR_BYTES * num_branches)
    if not compiled:  # the reference gathers the keys and values of a row, and its queries by key head
        row = 2 * spec.num_kv_heads + 4 * spec.num_heads
        rest += length * row * spec.head_dim * max(dtype.itemsize, 4)
    if device.type == "cuda":
        rest += _GPU_WORKSPACES
        if StepGraphs.possible(model):
            captured = min(packed_capacity(min(step, MAX_GRAPH_TOKENS)), step)
            if chunk <= MAX_GRAPH_TOKENS:
                captured = max(captured, row_capacity(chunk))
            rest += _GRAPH_SHARE * transformer.activation_bytes(spec, dtype, captured, **kinds)
    return Needs(cache, work, rest)


def _block_needs(model: Model, config: DecodeConfig, num_requests: int, longest: int, least: bool) -> Needs:
    method = method_for(model, config)
    on_gpu = model.device.type == "cuda"
    kinds = dict(compiled=_compiled(model), quantization=model.quantization)
    tokens = block_memory.work_tokens(model, method, num_requests, longest)
    work = transformer.activation_bytes(model.spec, model.dtype, tokens, **kinds)
    cache = block_memory.cache_bytes(model, method, num_requests, longest, least=least)
    return Needs(cache, work, _GPU_WORKSPACES + work if on_gpu else 0)


def _compiled(model: Model) -> bool:
    if model.device.type == "cpu" and model.backend is None:
        return False
    names = ("lm_head_confidence", "varlen_attention", "linear_swiglu")
    size = dict(head_dim=model.spec.head_dim)
    return all(bbk.backend_of(name, model.device, model.backend, **size) != "reference" for name in names)


def free_bytes(model: Model) -> int:
    """Memory that a new batch may take: what is free, and what batches hold that wait for another decode."""
    free = devices.free_bytes(model.device)
    if model.device.type == "cpu":
        return free
    idle = model.runners.idle_bytes() if model.runners else 0
    return max(0, free - pool_bytes(model.device) + idle)


def first_batch(
    model: Model, prompts: list[list[int]], config: DecodeConfig, region: int | None = None
) -> list[list[int]]:
    """The first of `prompts`, as many as `cache_bytes`, or else the free memory, has room for.

    Called in the turn in which the batch is made, so that what is free still is. `region` as of `needs`.

    Raises:
        MemoryError: one of the prompts, alone, does not fit.
    """
    limit, source, purpose = model.cache_bytes, "cache_bytes", "the K/V cache"
    if limit is None:
        limit = share_of(model).least("free memory", free_bytes(model))
        source = f"free memory of {model.device}"
        purpose = "the K/V cache and a forward"
    if is_block_causal(model.spec):
        limit = limit // (1 if model.cache_bytes is not None else block_memory.GROWTH)
        limit -= block_memory.held_bytes(model)

    def needed(requests: int, longest: int, least: bool = False) -> int:
        total = needs(model, config, requests, longest, least=least, region=region)
        return total.cache if model.cache_bytes is not None else sum(total)

    longest = max(map(len, prompts))
    if (least := needed(1, longest, least=True)) > limit:
        rows = f"{len(config.block_sizes)} branches" if config.block_sizes else "1 branch"
        if config.drafts:
            rows += f" and {len(config.drafts)} drafts" if len(config.drafts) > 1 else " and 1 draft"
        raise MemoryError(
            f"{source}: expected at least {least:,} bytes for {purpose} of "
            f"{rows} of {longest + (region or config.gen_length)} positions, got {limit:,}{_others(model)}"
        )
    lengths = list(itertools.accumulate(map(len, prompts), max))
    # More prompts need more, so the first number that is too many is found by halving.
    count = bisect.bisect_right(range(2, len(prompts) + 1), limit, key=lambda n: needed(n, lengths[n - 1]))
    return prompts[: count + 1]


def _others(model: Model) -> str:
    """What else the process holds on a GPU, for a message."""
    if model.device.type == "cpu" or model.cache_bytes is not None:
        return ""
    held = torch.cuda.memory_allocated(model.device)
    return f" (this process holds {held:,}, weights and running decodes among them)"
