"""What the forward pass must know of a checkpoint: sizes, special tokens, switches between families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("llada", "dream", "sdar", "fast_dllm_v2")
# Those whose attention is causal across blocks.
BLOCK_FAMILIES = ("sdar", "fast_dllm_v2")

_REQUIRED = object()


class CheckpointError(ValueError):
    """A model folder is wrong; the message names the file or tensor, what was expected and what came."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape and conventions of one transformer.

    Attributes:
        family: one of `FAMILIES`.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size: the usual sizes.
        vocab_size: number of token ids that may be given or predicted.
        embedding_size: rows of the embedding table, at least `vocab_size` (the rest is padding).
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        max_length: longest canvas in tokens.
        mask_token_id: id of MASK; None: not known (a block-causal model without a tokenizer), so that the
            model can be run but not decoded.
        eos_token_ids: ids that end a text, from config.json alone; may be empty.
        qkv_bias: whether the query, key and value products have a bias.
        tie_embeddings: whether the LM head is the embedding table.
        prediction_offset: the logits at position i predict position i + this (LLaDA 0, Dream 1).
        suppress_mask: whether the logit of MASK counts as minus infinity (Dream).
        leap_threshold: the family's lower commit threshold near anchors in LocalLeap (arXiv 2510.07081).
        qk_norm: whether each head of q and k has an RMSNorm before RoPE (SDAR).
        block_size: of a block-causal model: attention sees all of its own block and of the blocks before it;
            None: it sees everything.

    Raises:
        CheckpointError: a field is out of range or two fields contradict each other.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    embedding_size: int
    rope_theta: float
    rms_norm_eps: float
    max_length: int
    mask_token_id: int | None
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool
    tie_embeddings: bool
    prediction_offset: int
    suppress_mask: bool
    leap_threshold: float
    qk_norm: bool = False
    block_size: int | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise CheckpointError on the first field that is out of range or contradicts another."""
        if self.family not in FAMILIES:
            raise CheckpointError(f"family must be one of {FAMILIES}, got {self.family!r}")
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "embedding_size",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise CheckpointError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_kv_heads must divide the {self.num_heads} query heads, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.embedding_size < self.vocab_size:
            raise CheckpointError(
                f"embedding_size must be at least vocab_size = {self.vocab_size}, got {self.embedding_size}"
            )
        mask = () if self.mask_token_id is None else (self.mask_token_id,)
        for name, ids in (("mask_token_id", mask), ("eos_token_ids", self.eos_token_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise CheckpointError(
                        f"{name} must lie in [0, vocab_size = {self.vocab_size}), got {token}"
                    )
        if self.mask_token_id in self.eos_token_ids:
            raise CheckpointError(f"mask_token_id {self.mask_token_id} must not be one of eos_token_ids")
        if self.prediction_offset not in (0, 1):
            raise CheckpointError(f"prediction_offset must be 0 or 1, got {self.prediction_offset}")
        if not 0 < self.leap_threshold <= 1:
            raise CheckpointError(f"leap_threshold must lie in (0, 1], got {self.leap_threshold}")
        if (self.block_size is None) == (self.family in BLOCK_FAMILIES):
            raise CheckpointError(
                f"block_size must be a size for {' and '.join(BLOCK_FAMILIES)} alone, got {self.block_size} "
                f"for {self.family}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise CheckpointError(f"block_size must be at least 1, got {self.block_size}")


def is_block_causal(spec: Any) -> bool:
    """Whether attention is causal across blocks; a spec without a block size is one of full attention."""
    return getattr(spec, "block_size", None) is not None


def read_int(config: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    """The integer `config[key]`; `default` where it is absent or null (an error if there is no default)."""
    value = _read(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def read_float(config: Mapping[str, Any], key: str, default: float) -> float:
    """The number `config[key]`; `default` where it is absent or null."""
    value = _read(config, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def read_bool(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean `config[key]`; `default` where it is absent or null."""
    value = _read(config, key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def read_token_ids(config: Mapping[str, Any], key: str, *, source: str = "config.json") -> tuple[int, ...]:
    """Token ids written as one integer, a list of integers, null or not at all; without repeats."""
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"{source}: {key} must be an integer or a list of integers, got {value!r}")
    return tuple(dict.fromkeys(ids))


def require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> None:
    """Refuse a setting that the forward pass does not implement.

    Args:
        allowed: the accepted values of `config[key]`.
        default: what an absent key stands for in the family's published configuration.
    """
    value = config.get(key, default)
    # 0 == False in Python, so types are compared as well.
    if not any(value == good and type(value) is type(good) for good in allowed):
        expected = " or ".join(repr(good) for good in allowed)
        came = f"got {value!r}" if key in config else f"it is absent, which means {value!r}"
        raise CheckpointError(f"config.json: {key} must be {expected} (nothing else is supported), {came}")


def _read(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise CheckpointError(f"config.json: {key} is missing")
    return default
