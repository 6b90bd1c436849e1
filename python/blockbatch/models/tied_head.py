"""An LM head stored beside tied embeddings: accepted where it equals them, and read where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from blockbatch.models.safetensors_file import FLOAT_DTYPES, ITEM_SIZES, TensorEntry, read_tensor
from blockbatch.models.spec import CheckpointError, ModelSpec
from blockbatch.models.weights import Destination

_PIECE = 1 << 20  # elements compared at a time

Places = dict[str, Destination]


def resolve(
    places: Places,
    entries: dict[str, TensorEntry],
    spec: ModelSpec,
    tensor_map: Callable[[ModelSpec], Places],
) -> tuple[TensorEntry, TensorEntry] | None:
    """The head and the embedding of a checkpoint that stores both although they are tied.

    Some exporters keep the one name, some the other, some both.

    Args:
        places: what the checkpoint should hold; *written*: the embedding goes by the head's name where that
            alone is stored.
        entries: what it holds; *written*: a head beside the embedding is taken out.
        tensor_map: of the family.

    Returns:
        The two tensors whose values must be equal; None where there is nothing to compare.

    Raises:
        CheckpointError: the head has another shape than the embedding, or a dtype that cannot be compared.
    """
    if not spec.tie_embeddings:
        return None
    untied = tensor_map(replace(spec, tie_embeddings=False))
    head, embedding = (
        next(name for name, place in untied.items() if place.layer is None and place.field == field)
        for field in ("lm_head", "embedding")
    )
    if head not in entries:
        return None
    if embedding not in entries:
        places[head] = places.pop(embedding)
        return None
    stored, table = entries[head], entries[embedding]
    if stored.shape != table.shape or stored.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{stored.path}: tensor {head!r}: expected the tied embedding again or nothing, {table.dtype} "
            f"{list(table.shape)}, got {stored.dtype} {list(stored.shape)}"
        )
    del entries[head]
    return stored, table


def from_embedding(places: Places, spec: ModelSpec) -> tuple[str, Destination]:
    """The tensor that a tied head is read from where it is no part of the embedding, and where it belongs."""
    name, place = next((name, place) for name, place in places.items() if place.field == "embedding")
    return name, Destination(None, "lm_head", 0, spec.vocab_size, place.shape)


def compare(head: TensorEntry, embedding: TensorEntry, rows: int, staging: torch.Tensor) -> None:
    """Check that two stored tensors have the same values in their first `rows` rows.

    Args:
        head, embedding: [at least `rows`, hidden_size], of one shape.
        staging: see `read_tensor`.

    Raises:
        CheckpointError: they differ.
    """
    hidden = head.shape[1]
    pieces = torch.empty(2, min(_PIECE, rows * hidden), dtype=torch.float32, device="cpu")
    for start in range(0, rows * hidden, _PIECE):
        count = min(_PIECE, rows * hidden - start)
        for entry, piece in zip((head, embedding), pieces, strict=True):
            begin = entry.begin + start * ITEM_SIZES[entry.dtype]
            read_tensor(replace(entry, begin=begin), piece[:count], staging)
        different = (pieces[0, :count] != pieces[1, :count]).nonzero()
        if len(different):
            row = (start + int(different[0])) // hidden
            raise CheckpointError(
                f"{head.path}: tensor {head.name!r}: expected the values of {embedding.name!r}, since "
                f"config.json ties them, got others from row {row} on"
            )
