"""Which method a decode of a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_diffusion import BUILDERS, BlockMethod
from blockbatch.decoding.method import Method
from blockbatch.decoding.rule import check_rule
from blockbatch.decoding.sampling import RequestSampling, request_sampling, sampling_kind
from blockbatch.methods import METHOD_TABLE
from blockbatch.models.spec import is_block_causal


class _Builders(Mapping[str, Callable[..., Method]]):
    """The builder of every method of the table, which may grow."""

    def __getitem__(self, name: str) -> Callable[..., Method]:
        row = METHOD_TABLE[name]
        return row.builder or import_module(row.module).method

    def __iter__(self) -> Iterator[str]:
        return iter(METHOD_TABLE)

    def __len__(self) -> int:
        return len(METHOD_TABLE)


METHOD_BUILDERS = _Builders()
# Of block-causal models.
BLOCK_METHOD_BUILDERS = BUILDERS


def method_for(model, config: DecodeConfig) -> Method | BlockMethod:
    """The method of `config` for a model with the attributes `spec` and `eos_token_ids`.

    Raises:
        ValueError: the model cannot run it, or lacks an option of it.
        TypeError: a builder of one's own returned something else.
    """
    spec = model.spec
    blocks = is_block_causal(spec)
    builders = BLOCK_METHOD_BUILDERS if blocks else METHOD_BUILDERS
    if config.method not in builders:
        kind = "block-causal" if blocks else "full"
        raise ValueError(
            f"method: expected {' or '.join(builders)} for {spec.family}, whose attention is {kind}, got "
            f"{config.method!r}"
        )
    if config.trace_kv and blocks:
        raise ValueError(
            f"trace_kv: expected False for {spec.family}, whose stored K/V never change, got True"
        )
    ends = eos_token_ids(model, config)
    method = builders[config.method](config, spec, ends)
    if not isinstance(method, (Method, BlockMethod)):
        raise TypeError(
            f"method: expected a builder of {config.method!r} that returns a Method, got {method!r:.80}"
        )
    if isinstance(method, Method) and method.rule:
        check_rule(method.block_sizes, method.params)
    return method._replace(sampling=sampling_kind(config, spec.vocab_size, ends))


def sampling_for(model, config: DecodeConfig, index: int) -> RequestSampling | None:
    """How the tokens of prompt `index` of a call are drawn; None: they are those of the highest logits."""
    ends = eos_token_ids(model, config)
    kind = sampling_kind(config, model.spec.vocab_size, ends)
    return None if kind is None else request_sampling(config, kind, ends, index)


def eos_token_ids(model, config: DecodeConfig) -> tuple[int, ...]:
    """The ids that end a text: those of the settings, else the model's."""
    ids = model.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    for token in ids:
        if not 0 <= token < model.spec.vocab_size:
            raise ValueError(
                f"eos_token_ids: expected ids from 0 to {model.spec.vocab_size - 1}, got {token}"
            )
    return ids
