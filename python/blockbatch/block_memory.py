"""What texts of a block-causal model need of the device's memory."""

from __future__ import annotations

from blockbatch import kv_cache
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_pool import GROWTH as GROWTH
from blockbatch.decoding.block_pool import open_forward as open_forward
from blockbatch.decoding.block_pool import page_bytes, scratch_pages
from blockbatch.decoding.session import ROW_TOKENS
from blockbatch.models.model import Model


def cache_bytes(model: Model, method: BlockMethod, num_requests: int, longest: int, *, least: bool) -> int:
    """Bytes of the pages of so many texts behind prompts of at most `longest` tokens.

    Args:
        least: of a text that may grow its first block alone.
    """
    size = method.block_size
    positions = (longest // size + 1) * size if method.grow and least else method.positions(longest)
    return num_requests * (kv_cache.pages_per_row(positions) + scratch_pages(method)) * page_bytes(model)


def work_tokens(model: Model, method: BlockMethod, num_requests: int, longest: int) -> int:
    """Packed tokens of the largest forward: prompts, or the blocks of all branches and one to store."""
    denoised = num_requests * (max(len(method.block_sizes), 1) + 1) * method.block_size
    prefilled = min(num_requests * longest, max(longest, ROW_TOKENS[model.device.type]))
    return max(denoised, prefilled)


def held_bytes(model: Model) -> int:
    """Bytes of the pages that texts hold now."""
    return 0 if model.pool is None else model.pool.held() * page_bytes(model)
