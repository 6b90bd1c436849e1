"""Which tokens of a training row are masked, and how much each counts: the states of a decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
_BLOCK_SHARES = (0.10, 0.12, 0.18, 0.22, 0.18, 0.20)
_BEHIND_WEIGHT = (
    0.1  # masks behind the block: decoding does not write there, but merging reads their confidence
)
_FILL_WEIGHT = 0.02  # EOS after the first one: easy, and most of a long canvas


@dataclass
class Masks:
    """masked [rows, length] bool; weights [rows, length] float32, 0 where not masked; block: the window."""

    masked: Tensor
    weights: Tensor
    block: Tensor


def draw_masks(prompt_ends: Tensor, content_ends: Tensor, length: int, generator: torch.Generator) -> Masks:
    """Draw masks for rows of `length` tokens: prompt [0, prompt_end), answer up to content_end, EOS after it.

    Four rows in five are in the middle of block-wise decoding: everything before the block is known, the
    block is masked in part or wholly, and behind it all is masked, except that some rows have a few later
    tokens (as merging leaves them) or their EOS tail known already. The others mask everything after the
    prompt at one random rate. The prompt is never masked.
    """
    rows, device = prompt_ends.shape[0], prompt_ends.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, device=device, generator=generator)

    position = torch.arange(length, device=device)[None]
    prompt, content = prompt_ends[:, None], content_ends[:, None]
    generated = position >= prompt

    shares = torch.tensor(_BLOCK_SHARES, device=device).expand(rows, -1)
    sizes = torch.tensor(BLOCK_SIZES, device=device)
    size = sizes[torch.multinomial(shares, 1, generator=generator)]  # [rows, 1]
    # One of the blocks that hold the answer or its first EOS.
    blocks = (content + 1 - prompt + size - 1) // size
    start = prompt + (uniform(rows, 1) * blocks).long() * size
    block = (position >= start) & (position < start + size)
    behind = position >= start + size

    style = uniform(rows, 1)
    whole = uniform(rows, 1) < 0.25
    rate = torch.where(whole, 1.0, uniform(rows, 1))
    known_start = start + (uniform(rows, 1) * size * (uniform(rows, 1) < 0.3) * ~whole).long()
    in_block = block & (uniform(rows, length) < rate) & (position >= known_start)
    later_known = (style >= 0.5) & (style < 0.65) & (uniform(rows, length) < 0.3 * uniform(rows, 1))
    tail_start = content + (uniform(rows, 1) * 24 * (uniform(rows, 1) < 0.6)).long()
    tail_known = (style >= 0.6) & (style < 0.8) & (position >= tail_start)
    blockwise = (in_block | (behind & ~later_known)) & ~tail_known
    scattered = generated & (uniform(rows, length) < uniform(rows, 1))

    masked = torch.where(style < 0.8, blockwise, scattered)
    weights = masked.float()
    weights *= torch.where((style < 0.8) & behind, _BEHIND_WEIGHT, 1.0)
    weights *= torch.where(position > content, _FILL_WEIGHT, 1.0)
    return Masks(masked, weights, block & (style < 0.8))


def reveal_confident(masks: Masks, right: Tensor, confidence: Tensor, generator: torch.Generator) -> Masks:
    """Unmask, in half of the rows' blocks, what the model itself would commit first.

    right: [rows, length] bool, the model's top token is the true one; confidence: its probability. Each row
    reveals what is right and above a random confidence, so the tokens left are those that decoding leaves for
    later.
    """
    rows, device = right.shape[0], right.device
    level = torch.rand((rows, 1), device=device, generator=generator)
    level = torch.where(level < 0.5, 2.0, 0.2 + 1.5 * (level - 0.5))
    revealed = masks.block & right & (confidence > level)
    return Masks(masks.masked & ~revealed, masks.weights * ~revealed, masks.block)
