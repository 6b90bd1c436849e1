"""What a training row of the block-causal model looks like: noisy blocks, what they see, what counts.

The recipe of block diffusion (BD3-LM, arXiv 2503.09573; SDAR trains the same way): one forward over noisy
blocks and the clean text together. A noisy block sees itself, in both directions, and the clean blocks before
it, which is what it sees in decoding; so all blocks of a text learn in one forward. Ours is which blocks are
noisy (those of the answer alone, as many copies as the row has room for) and the masks inside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockbatch.tiny.masking import Masks

WINDOWS = (4, 8, 16, 32)  # sizes of the branches that decoding runs inside a block
_BEHIND_WEIGHT = 0.3  # masks behind a branch's window: it does not write there, but merging reads them
_FILL_WEIGHT = 0.05  # EOS after the first one
PART_TOKENS = 256  # queries of an attention call with a mask; every block size divides it


@dataclass
class Slots:
    """The noisy blocks of rows [rows, length]: `count` slots a row, each a copy of one block of its row.

    blocks [rows, count] int64, the block in each slot; positions [rows, count * block_size] int64; open, the
    same shape, bool: a generated position, which may be masked.
    """

    blocks: Tensor
    positions: Tensor
    open: Tensor


def draw_slots(
    prompt_ends: Tensor, content_ends: Tensor, count: int, block_size: int, generator: torch.Generator
) -> Slots:
    """Deal the blocks that hold a row's answer and its first EOS to its slots, in turns from a random one.

    The first of them may begin with the prompt's end, which is never masked: blocks count from position 0.
    """
    rows, device = prompt_ends.shape[0], prompt_ends.device
    first, last = (prompt_ends // block_size)[:, None], (content_ends // block_size)[:, None]
    number = last - first + 1
    start = (torch.rand((rows, 1), device=device, generator=generator) * number).long()
    blocks = first + (torch.arange(count, device=device) + start) % number
    inside = torch.arange(block_size, device=device)
    positions = (blocks[..., None] * block_size + inside).flatten(1)
    return Slots(blocks, positions, positions >= prompt_ends[:, None])


def draw_noise(slots: Slots, content_ends: Tensor, block_size: int, generator: torch.Generator) -> Masks:
    """Masks of the slots, as rows of one block: [rows * count, block_size].

    Half of the slots are masked at one random rate each, as the recipe says. The other half are as a branch
    with smaller blocks leaves them: known before its window, masked at a random rate inside it, and masked
    behind it, except for a few tokens that merging may have brought.
    """
    positions = slots.positions.view(-1, block_size)
    shape, device = positions.shape, positions.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, device=device, generator=generator)

    number = shape[0]
    rate = torch.where(uniform(number, 1) < 0.25, 1.0, uniform(number, 1))
    scattered = uniform(*shape) < rate
    windows = torch.tensor([size for size in WINDOWS if size <= block_size], device=device)
    window = windows[(uniform(number, 1) * len(windows)).long()]
    start = (uniform(number, 1) * (block_size // window)).long() * window
    inside = torch.arange(block_size, device=device)
    before, behind = inside < start, inside >= start + window
    known_behind = uniform(*shape) < torch.where(uniform(number, 1) < 0.3, 0.3 * uniform(number, 1), 0.0)
    windowed = torch.where(behind, ~known_behind, scattered & ~before)
    by_window = uniform(number, 1) < 0.5

    generated = slots.open.view(-1, block_size)
    masked = torch.where(by_window, windowed, scattered) & generated
    weights = masked.float()
    weights *= torch.where(by_window & behind, _BEHIND_WEIGHT, 1.0)
    weights *= torch.where(slots.positions > content_ends[:, None], _FILL_WEIGHT, 1.0).view(shape)
    return Masks(masked, weights, generated & ~(by_window & behind))


@dataclass
class AttentionPart:
    """Some queries of a row and all the keys that any of them sees.

    queries: positions in the row; keys: ranges of positions; mask [rows or 1, 1, queries, keys] bool, True
    where the query sees the key, the keys numbered through the ranges.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor


def clean_parts(length: int, block_size: int, device: torch.device, offset: int = 0) -> list[AttentionPart]:
    """Attention of a clean text at `offset` in its row: bidirectional in a block, causal across blocks."""
    block = torch.arange(length, device=device) // block_size
    parts = []
    for begin in range(0, length, PART_TOKENS):
        end = min(begin + PART_TOKENS, length)
        mask = block[begin:end, None] >= block[None, :end]
        keys = (slice(offset, offset + end),)
        parts.append(AttentionPart(slice(offset + begin, offset + end), keys, mask[None, None]))
    return parts


def combined_parts(blocks: Tensor, length: int, block_size: int) -> list[AttentionPart]:
    """Attention of rows [noisy slots | clean text]; blocks [rows, count]: the block in each slot.

    A slot sees itself and the clean blocks before its own; the clean text sees itself block-causally, and no
    slot. In parts, since three quarters of what a mask over the whole row covers is never seen.
    """
    device, noisy = blocks.device, blocks.shape[1] * block_size
    of_query = blocks.repeat_interleave(block_size, dim=1)[..., None]  # [rows, noisy, 1]
    slot = torch.arange(noisy, device=device) // block_size
    clean_block = torch.arange(length, device=device) // block_size
    parts = []
    for begin in range(0, noisy, PART_TOKENS):
        some = slice(begin, min(begin + PART_TOKENS, noisy))
        before = clean_block < of_query[:, some]
        own = (slot[some, None] == slot[None, some]).expand(len(blocks), -1, -1)
        mask = torch.cat((own, before), dim=2)[:, None]
        parts.append(AttentionPart(some, (some, slice(noisy, noisy + length)), mask))
    return parts + clean_parts(length, block_size, device, offset=noisy)
