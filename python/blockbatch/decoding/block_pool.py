"""The pool that the pages of a block-causal model's texts come from, and what runs on it."""

from __future__ import annotations

import weakref

from blockbatch import kv_cache
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_forward import BlockForward
from blockbatch.models.model import Model
from blockbatch.parallel import share_of
from blockbatch.text_pages import TextPages

# While a pool grows, its pages are there twice.
GROWTH = 2
# Of a text a GPU's pool makes room for so many at once: captured steps are of no use once it has moved.
_FIRST_POSITIONS = 4096


def page_bytes(model: Model) -> int:
    spec = model.spec
    return kv_cache.cache_bytes(
        1,
        kv_cache.PAGE_SIZE,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=model.kv_dtype,
    )


def open_forward(model: Model, method: BlockMethod, lengths: list[int], free: int) -> BlockForward:
    """The model's pool with what runs on it, made at the first call.

    Args:
        lengths: of the prompts to come.
        free: bytes that the pool may take beside what it has, unless the model's `cache_bytes` says it.
    """
    forward = shared_forward(model)
    pool = model.pool
    limit = free // GROWTH if model.cache_bytes is None else model.cache_bytes
    limit = share_of(model).least("pages of a decode", limit // page_bytes(model))
    pool.most_pages = max(limit, len(pool))
    if model.device.type == "cuda":
        pages = kv_cache.pages_per_row
        firsts = (min(method.positions(length), length + _FIRST_POSITIONS) for length in lengths)
        pool.reserve(sum(pages(first) + scratch_pages(method) for first in firsts))
    return forward


def shared_forward(model: Model) -> BlockForward:
    """What all texts of a model run on; its pool, made at the first call, may not grow yet."""
    spec = model.spec
    if model.block_forward is None:
        pool = TextPages(
            0,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=model.kv_dtype,
            device=model.device,
        )
        model.pool, model.block_forward = pool, BlockForward(weakref.proxy(model), pool)
    return model.block_forward


def scratch_pages(method: BlockMethod) -> int:
    """Pages of the blocks of all branches but the first."""
    return (max(len(method.block_sizes), 1) - 1) * kv_cache.pages_per_row(method.block_size)
