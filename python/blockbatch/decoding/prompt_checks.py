"""What makes a prompt impossible to decode."""

from __future__ import annotations

from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.choice import method_for
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal


def check_prompt(model: Model, ids: list[int], config: DecodeConfig, name: str) -> None:
    """Raises ValueError if a prompt's ids cannot be decoded; `name` is what the message calls it."""
    spec = model.spec
    method = method_for(model, config.for_model(spec))
    if not ids and spec.prediction_offset:
        raise ValueError(f"{name}: expected at least one token for {spec.family}, got an empty prompt")
    check_ids(ids, spec.vocab_size, name)
    if spec.mask_token_id in ids:
        raise ValueError(
            f"{name}: expected no MASK token (id {spec.mask_token_id}), got one at position "
            f"{ids.index(spec.mask_token_id)}; blockbatch.fill decodes MASK inside a text"
        )
    if is_block_causal(spec):
        _check_blocks(ids, method, spec.max_length, name)
        return
    canvas = len(ids) + config.gen_length
    if canvas > spec.max_length:
        raise ValueError(
            f"{name}: expected prompt and gen_length to fit in {spec.max_length} positions, got {len(ids)} + "
            f"{config.gen_length} = {canvas}"
        )


def check_ids(ids: list[int], vocab_size: int, name: str) -> None:
    """Raises ValueError for an id outside of the vocabulary."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {token} at {position}")


def _check_blocks(ids: list[int], method: BlockMethod, most: int, name: str) -> None:
    """That a text fits in the model's positions: its first block where it may grow, else all of it."""
    size = method.block_size
    positions = (len(ids) // size + 1) * size if method.grow else method.positions(len(ids))
    if positions > most:
        raise ValueError(
            f"{name}: expected prompt and gen_length in whole blocks of {size} to fit in {most} positions, "
            f"got {len(ids)} + {method.gen_length}, which take {positions}"
        )


def check_stop(model: Model, config: DecodeConfig) -> None:
    """Raises ValueError if a model cannot find the texts of `config.stop`."""
    if not config.stop:
        return
    if model.tokenizer is None:
        raise ValueError("stop: expected a model with a tokenizer to find texts, got one without")
    for text in config.stop:
        if model.tokenizer.token_to_id(text) == model.spec.mask_token_id:
            raise ValueError(f"stop: expected texts that can be decoded, got the MASK token {text!r}")
