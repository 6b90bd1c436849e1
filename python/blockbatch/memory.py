"""What a decode needs of the device's memory, and how many prompts fit at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from blockbatch import kv_cache
from blockbatch.config import DecodeConfig
from blockbatch.decoding import BLOCK_METHOD_BUILDERS
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.session import ROW_TOKENS
from blockbatch.models import transformer
from blockbatch.models.model import Model
from blockbatch.page_pool import PagePool

# On a GPU prompts share buffers with others of about their length, so that graphs are captured once.
_PROMPT_STEP = 64


class Needs(NamedTuple):
    """Bytes that a batch takes beside the weights.

    Attributes:
        cache: the K/V cache, allocated once before the first forward.
        work: activations, logits and partial results of a forward, at most.
    """

    cache: int
    work: int

    def __str__(self) -> str:
        return f"K/V cache {self.cache / 2**20:,.0f} MiB, working memory up to {self.work / 2**20:,.0f} MiB"


def longest_prompt(device: torch.device, longest: int) -> int:
    """Tokens of prompt that a batch makes room for."""
    return longest if device.type == "cpu" else -(-max(longest, 1) // _PROMPT_STEP) * _PROMPT_STEP


def needs(
    model: Model, config: DecodeConfig, num_requests: int, longest: int, *, least: bool = False
) -> Needs:
    """What a batch of `num_requests` prompts of at most `longest` tokens takes.

    Args:
        least: with `max_length="grow"` what the first block takes, rather than the whole text.
    """
    spec, dtype = model.spec, model.dtype
    if spec.block_size is not None:
        return _block_needs(model, _block_method(model, config), num_requests, longest, least)
    rows, length = num_requests * _rows(config), longest_prompt(model.device, longest) + config.gen_length
    cache = kv_cache.cache_bytes(
        rows,
        length,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
    )
    # Whole rows go in chunks; a block step holds at most every row's generation region and, where a model
    # predicts the next position, the one in front of it.
    region = config.gen_length + spec.prediction_offset
    tokens = min(rows * length, max(length, ROW_TOKENS[model.device.type], rows * region))
    return Needs(cache, transformer.activation_bytes(spec, dtype, tokens))


def _block_method(model: Model, config: DecodeConfig) -> BlockMethod:
    return BLOCK_METHOD_BUILDERS[config.method](config, model.spec, model.eos_token_ids)


def _block_needs(model: Model, method: BlockMethod, num_requests: int, longest: int, least: bool) -> Needs:
    """Pages of every request, and activations of the prompts' forwards or of two blocks of every branch."""
    size, pages = method.block_size, kv_cache.pages_per_row
    branches = max(len(method.block_sizes), 1)
    positions = (longest // size + 1) * size if method.grow and least else method.positions(longest)
    each = pages(positions) + (branches - 1) * pages(size)
    denoised = num_requests * (branches + 1) * size
    prefilled = min(num_requests * longest, max(longest, ROW_TOKENS[model.device.type]))
    work = transformer.activation_bytes(model.spec, model.dtype, max(denoised, prefilled))
    return Needs(num_requests * each * _page_bytes(model), work)


def _page_bytes(model: Model) -> int:
    spec = model.spec
    return kv_cache.cache_bytes(
        1,
        kv_cache.PAGE_SIZE,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
    )


def page_pool(model: Model) -> PagePool:
    """The model's pages, made at the first call; they may take `cache_bytes`, or else the free memory."""
    spec = model.spec
    if model.pool is None:
        model.pool = PagePool(
            0,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
    # While a pool grows, its pages are there twice.
    limit = model.cache_bytes if model.cache_bytes is not None else free_bytes(model) // 2
    model.pool.most_pages = max(limit // _page_bytes(model), len(model.pool))
    return model.pool


def first_pages(method: BlockMethod, lengths: list[int]) -> int:
    """Pages that prompts of these lengths will need soon: those of up to 4096 positions of each text."""
    pages = kv_cache.pages_per_row
    more = (max(len(method.block_sizes), 1) - 1) * pages(method.block_size)
    return sum(pages(min(method.positions(length), length + 4096)) + more for length in lengths)


def _rows(config: DecodeConfig) -> int:
    """Rows of a request: its branches and its drafts."""
    branches = len(config.block_sizes) if config.block_sizes else 1
    return branches + len(config.drafts or ())


def free_bytes(model: Model) -> int:
    """Memory that a new batch may take."""
    device = model.device
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        idle = model.runners.idle_bytes() if model.runners else 0
        return int((torch.cuda.mem_get_info(device)[0] + held + idle) * 0.95)
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    return int(pages * os.sysconf("SC_PAGE_SIZE") * 0.9) if pages else 2**40


def batches(model: Model, prompts: list[list[int]], config: DecodeConfig) -> Iterator[list[list[int]]]:
    """As many prompts at a time as `cache_bytes`, or else the free memory, has room for.

    Raises:
        MemoryError: a single prompt does not fit; before the first batch.
    """
    limit, source, purpose = model.cache_bytes, "cache_bytes", "the K/V cache"
    if limit is None:
        limit, source = free_bytes(model), f"free memory of {model.device}"
        purpose = "the K/V cache and a forward"
        if model.spec.block_size is not None:
            limit //= 2  # see `page_pool`

    if model.pool is not None:
        limit -= model.pool.held() * _page_bytes(model)

    def needed(requests: int, longest: int, least: bool = False) -> int:
        total = needs(model, config, requests, longest, least=least)
        return total.cache if model.cache_bytes is not None else sum(total)

    rows = f"{len(config.block_sizes)} branches" if config.block_sizes else "1 branch"
    if config.drafts:
        rows += f" and {len(config.drafts)} drafts" if len(config.drafts) > 1 else " and 1 draft"
    for ids in prompts:
        if needed(1, len(ids), least=True) > limit:
            raise MemoryError(
                f"{source}: expected at least {needed(1, len(ids), least=True):,} bytes for {purpose} of "
                f"{rows} of {len(ids) + config.gen_length} positions, got {limit:,}"
            )
    batch: list[list[int]] = []
    for ids in prompts:
        longest = max(len(other) for other in [*batch, ids])
        if batch and needed(len(batch) + 1, longest) > limit:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch
