"""How the tokens of each request are drawn: values of settings, and where they lie on the device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.config import DecodeConfig
from blockbatch.models.drawn import Draw
from blockbatch.sampling_options import request_seed


class SamplingKind(NamedTuple):
    """What decides which work a forward launches, and so belongs to the method. Requests of different kinds
    are not decoded together.

    Attributes:
        confidence: one of `blockbatch_kernels.CONFIDENCES`.
        filters_p, filters_k: whether `top_p` and `top_k` are looked at.
        changed: ids whose logits may be changed.
    """

    confidence: str
    filters_p: bool
    filters_k: bool
    changed: tuple[int, ...]


class RequestSampling(NamedTuple):
    """What one request asks for.

    Attributes:
        temperature, seed, top_p, top_k: as `blockbatch_kernels.SamplingRules` has them.
        logit_bias, min_tokens: one for each changed id of the kind; a generated position below the latter is
            not to hold the id.
    """

    temperature: float
    seed: int
    top_p: float
    top_k: int
    logit_bias: tuple[float, ...]
    min_tokens: tuple[int, ...]


def sampling_kind(
    config: DecodeConfig, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> SamplingKind | None:
    """The kind of a decode with these settings; None: the top token and its probability.

    Raises:
        ValueError: an id that the model does not have, or nothing is left to write.
    """
    for token in config.bad_token_ids:
        if token >= vocab_size:
            raise ValueError(f"bad_token_ids: expected ids from 0 to {vocab_size - 1}, got {token}")
    for name in ("min_tokens", "eos_bias"):
        if getattr(config, name) and not eos_token_ids:
            raise ValueError(
                f"{name}: expected 0 for a model without an EOS, got {getattr(config, name)} (eos_token_ids= "
                "names one)"
            )
    if config.is_plain:
        return None
    ends = eos_token_ids if config.min_tokens or config.eos_bias else ()
    changed = tuple(sorted({*ends, *config.bad_token_ids}))
    # MASK is never drawn.
    if len(changed) + 1 >= vocab_size:
        raise ValueError(
            f"bad_token_ids: expected to leave a token that can be written, got {len(config.bad_token_ids)} "
            f"ids of {vocab_size}"
        )
    filters_p = config.top_p is not None and config.top_p < 1.0
    return SamplingKind(config.confidence, filters_p, config.top_k is not None, changed)


def request_sampling(
    config: DecodeConfig, kind: SamplingKind, eos_token_ids: tuple[int, ...], index: int
) -> RequestSampling:
    """What prompt `index` of a call with these settings asks for."""
    bias = dict.fromkeys(kind.changed, 0.0)
    bias |= dict.fromkeys((token for token in eos_token_ids if token in bias), config.eos_bias)
    bias |= dict.fromkeys(config.bad_token_ids, float("-inf"))
    return RequestSampling(
        temperature=config.temperature,
        seed=request_seed(config.seed, index),
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        logit_bias=tuple(bias.values()),
        min_tokens=tuple(config.min_tokens if token in eos_token_ids else 0 for token in kind.changed),
    )


class BatchSampling:
    """The rules of a batch's requests on the device, at addresses that stay.

    Args:
        num_requests: of the batch.
        kind: of them all.
        device: where they lie.
    """

    def __init__(self, num_requests: int, kind: SamplingKind, device: torch.device) -> None:
        self._kind = kind
        changed = torch.tensor(kind.changed, dtype=torch.int32, device="cpu").to(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(num_requests, *shape, dtype=dtype, device=device)

        self.rules = bbk.SamplingRules(
            temperature=zeros(dtype=torch.float32),
            seed=zeros(dtype=torch.int64),
            forward=zeros(),
            changed_token=changed,
            logit_bias=zeros(len(changed), dtype=torch.float32),
            banned_before=zeros(len(changed)),
            top_p=zeros(dtype=torch.float32) if kind.filters_p else None,
            top_k=zeros() if kind.filters_k else None,
        )

    def write(self, first: int, requests: Sequence[RequestSampling], prompt_lengths: Sequence[int]) -> None:
        """Puts in what requests ask for, from place `first` of the batch on."""
        values = _values(requests, [0] * len(requests), prompt_lengths)
        for name, target in self.rules._asdict().items():
            if target is not None and name not in ("changed_token", "forward"):
                dtype = torch.float32 if target.is_floating_point() else torch.int64
                host = torch.tensor(values[name], dtype=dtype, device="cpu")
                target[first : first + len(requests)].copy_(host.view(len(requests), *target.shape[1:]))

    def take_over(self, other: BatchSampling) -> None:
        """The same requests as a smaller batch of the same kind, at the same places."""
        for target, source in zip(self.rules, other.rules, strict=True):
            if target is not None:
                target[: len(source)] = source

    def draw(self, state: bbk.BranchState, target: Tensor) -> Draw:
        """For the predictions of `target`, row * G + generation position, -1 in the padding.

        The forwards of a request are those that its state counts, whatever its branches did in them. So a
        forward draws the same noise for all branches of a request.
        """
        place = target.clamp(min=0)
        request = (place // (state.gen_length * state.num_branches)).int()
        positions = state.prompt_length[request] + place % state.gen_length
        rules = self.rules._replace(forward=state.nfe.sum(1, dtype=torch.int32))
        return Draw(rules, request, positions.int(), self._kind.confidence)


def _values(
    requests: Sequence[RequestSampling], forwards: Sequence[int], prompt_lengths: Sequence[int]
) -> dict[str, list]:
    """The fields of the rules but for the changed ids, a list over requests each."""
    bans = [
        [length + count if count else 0 for count in request.min_tokens]
        for request, length in zip(requests, prompt_lengths, strict=True)
    ]
    return {
        "temperature": [request.temperature for request in requests],
        "seed": [request.seed for request in requests],
        "forward": list(forwards),
        "logit_bias": [list(request.logit_bias) for request in requests],
        "banned_before": bans,
        "top_p": [request.top_p for request in requests],
        "top_k": [request.top_k for request in requests],
    }


class RowSampling(NamedTuple):
    """What draws the predictions of one row of a block-causal model's forward.

    Attributes:
        kind: the same for all rows of a forward.
        request: what the row's request asks for.
        forward: denoise forwards that the request has had.
        prompt_length: of the request.
    """

    kind: SamplingKind
    request: RequestSampling
    forward: int
    prompt_length: int


def pack_rows(rows: Sequence[RowSampling]) -> list[int]:
    """The rules of rows as integers of 32 bits, for the one copy of a forward's inputs."""
    values = _values(
        [row.request for row in rows], [row.forward for row in rows], [row.prompt_length for row in rows]
    )
    packed = [*map(_float_bits, values["temperature"])]
    packed += [_signed(seed & 0xFFFFFFFF) for seed in values["seed"]]
    packed += [_signed(seed >> 32) for seed in values["seed"]]
    packed += values["forward"]
    packed += [_float_bits(bias) for line in values["logit_bias"] for bias in line]
    packed += [ban for line in values["banned_before"] for ban in line]
    packed += [*map(_float_bits, values["top_p"]), *values["top_k"], *rows[0].kind.changed]
    return packed


def packed_size(kind: SamplingKind, rows: int) -> int:
    """Integers of `pack_rows`."""
    return rows * (6 + 2 * len(kind.changed)) + len(kind.changed)


def unpack_rows(kind: SamplingKind, rows: int, packed: Tensor) -> bbk.SamplingRules:
    """The rules, on the device, out of what `pack_rows` made; a row counts as a request."""
    changed = len(kind.changed)
    sizes = [rows] * 4 + [rows * changed] * 2 + [rows] * 2 + [changed]
    heat, low, high, forward, bias, bans, top_p, top_k, tokens = packed.split(sizes)
    return bbk.SamplingRules(
        temperature=heat.view(torch.float32),
        seed=(high.long() << 32) | (low.long() & 0xFFFFFFFF),
        forward=forward,
        changed_token=tokens,
        logit_bias=bias.view(torch.float32).view(rows, changed),
        banned_before=bans.view(rows, changed),
        top_p=top_p.view(torch.float32) if kind.filters_p else None,
        top_k=top_k if kind.filters_k else None,
    )


def _float_bits(value: float) -> int:
    return struct.unpack("i", struct.pack("f", value))[0]


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits
