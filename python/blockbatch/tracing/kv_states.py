"""Where the K/V cache of each branch goes during a decode, as vectors short enough for a trace.

The state of a branch is the K and V of all layers at every position of its canvas, one vector of millions of
numbers. A trace keeps a random projection of it to `SKETCH_SIZE` numbers. The projection is the same for all
states of one canvas length and model shape, whatever the method, so states of different decodes of one prompt
can be compared. It keeps inner products in expectation (Johnson and Lindenstrauss, 1984): distances between
states come out right to about 10%.
"""

from __future__ import annotations

import torch

from blockbatch.kv_cache import KVCache

SKETCH_SIZE = 128
_SEED = 2605
# Steps between the states of a decode are a few percent of their length or more: six digits show them.
_DIGITS = 6


class KVSketcher:
    """Projects the cache rows of a session.

    Number d of a sketch is the sum over layers l, sides s (K, V), positions p and features f of
    ``signs[l, s, p, d] * mix[f, d] * kv[l, s, p, f] / sqrt(SKETCH_SIZE)`` with random signs and normal `mix`.
    Two small tables are affordable where one Gaussian matrix over a whole row is not: an 8B model's has
    10^10 entries.

    Args:
        cache: of the session; read, never written.
        lengths: canvas tokens of each request.
    """

    def __init__(self, cache: KVCache, lengths: list[int]) -> None:
        layers, sides, _, _, heads, head_dim = cache.kv.shape
        self._cache, self._lengths = cache, lengths
        # Drawn on the CPU, which gives the same numbers whatever the device of the cache is, and position by
        # position, so that a longer canvas only appends.
        mix = torch.Generator("cpu").manual_seed(_SEED)
        signs = torch.Generator("cpu").manual_seed(_SEED + 1)
        drawn = torch.randn(heads * head_dim, SKETCH_SIZE, generator=mix, device="cpu", dtype=torch.float32)
        self._mix = drawn.to(cache.kv.device)
        shape = (max(lengths), layers * sides, SKETCH_SIZE)
        drawn = torch.randint(0, 2, shape, generator=signs, dtype=torch.int8, device="cpu") * 2 - 1
        self._signs = drawn.permute(1, 0, 2).unflatten(0, (layers, sides)).to(cache.kv.device)

    @torch.inference_mode()
    def states(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Sketches of cache rows: (rows, state) for each group of rows that hold the same pages.

        Waits for the device.
        """
        tables = self._cache.page_table.tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            groups.setdefault(tuple(tables[row]), []).append(row)
        return [(group, self._sketch(group[0])) for group in groups.values()]

    def _sketch(self, row: int) -> list[float]:
        length = self._lengths[row // self._cache.num_branches]
        pages = self._cache.page_table[row].long()
        total = torch.zeros(SKETCH_SIZE, dtype=torch.float32, device=self._cache.kv.device)
        # Layer by layer: a whole row in fp32 would be as large as the rest of the decode's working memory.
        for layer, (kv, signs) in enumerate(zip(self._cache.kv, self._signs)):
            numbers = kv[:, pages].float()  # [2, pages, page_size, num_kv_heads, head_dim]
            if (scales := self._cache.scales) is not None:
                numbers *= torch.stack((scales.k[layer], scales.v[layer]))[:, None, None, :, None]
            features = numbers.flatten(3).flatten(1, 2)[:, :length]  # [2, length, features]
            total += ((features @ self._mix) * signs[:, :length]).sum((0, 1))
        return [float(f"{value:.{_DIGITS}g}") for value in (total / SKETCH_SIZE**0.5).tolist()]
