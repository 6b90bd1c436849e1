"""Which part of a model a rank holds.

Query heads with their keys and values, columns of the MLP and tokens of the LM head are dealt out in equal
consecutive parts, the first to rank 0. Products that come first (query/key/value, gate/up) lose rows of their
weight and give a part of the numbers; products that come second (output, down) lose columns and give a part
of each sum, which `RankGroup.all_reduce` completes. Norms and the embedding are on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size` of the model `spec`, a `ModelSpec`.

    Raises:
        ValueError: `size` does not divide what is dealt out.
    """

    spec: Any
    rank: int
    size: int

    def __post_init__(self) -> None:
        spec, size = self.spec, self.size
        for name in ("num_heads", "intermediate_size"):
            if getattr(spec, name) % size:
                raise ValueError(
                    f"tensor_parallel: expected a number that divides {name} = {getattr(spec, name)}, "
                    f"got {size}"
                )
        if spec.num_kv_heads % size and size % spec.num_kv_heads:
            raise ValueError(
                f"tensor_parallel: expected a number that divides num_kv_heads = {spec.num_kv_heads} or is a "
                f"multiple of it, got {size}"
            )
        if spec.vocab_size < size:
            raise ValueError(f"tensor_parallel: expected at most vocab_size = {spec.vocab_size}, got {size}")

    @property
    def local_spec(self) -> Any:
        """The shape of this rank's part: what its layers compute and its cache holds.

        With fewer key/value heads than ranks, several ranks hold the same one.
        """
        return replace(
            self.spec,
            num_heads=self.spec.num_heads // self.size,
            num_kv_heads=max(1, self.spec.num_kv_heads // self.size),
            intermediate_size=self.spec.intermediate_size // self.size,
        )

    @property
    def vocabulary(self) -> range:
        """Token ids of this rank's part of the LM head."""
        return range(*(self.spec.vocab_size * rank // self.size for rank in (self.rank, self.rank + 1)))

    def kv_heads(self, rank: int) -> range:
        """Heads of keys and values whose part is a rank's."""
        first = rank * self.spec.num_kv_heads // self.size
        return range(first, first + self.local_spec.num_kv_heads)

    def cut(self, place: Any) -> Any:
        """Where a tensor of the checkpoint belongs in this rank's part, and which part of it.

        Args:
            place: its `Destination` in the whole model.
        """
        spec, here, rank = self.spec, self.local_spec, self.rank
        q, kv = here.num_heads * spec.head_dim, here.num_kv_heads * spec.head_dim
        inner = here.intermediate_size
        if place.field in ("qkv_weight", "qkv_bias"):
            if place.start == 0:
                return replace(place, stop=q, first_row=rank * q)
            is_value = place.start > spec.num_heads * spec.head_dim
            start = q + kv if is_value else q
            # The heads that this rank's queries attend to.
            head = rank * spec.num_kv_heads // self.size
            return replace(place, start=start, stop=start + kv, first_row=head * spec.head_dim)
        if place.field == "gate_up_weight":
            start = inner if place.start else 0
            return replace(place, start=start, stop=start + inner, first_row=rank * inner)
        if place.field == "out_weight":
            return replace(place, first_column=rank * q)
        if place.field == "down_weight":
            return replace(place, first_column=rank * inner)
        if place.field == "lm_head":
            tokens = self.vocabulary
            return replace(place, stop=len(tokens), first_row=tokens.start)
        return place
