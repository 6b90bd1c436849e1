"""`generate` and `stream`: prompts in, results out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from blockbatch import branches, kv_cache
from blockbatch.config import DecodeConfig
from blockbatch.decoding import METHOD_BUILDERS, Session
from blockbatch.models import transformer
from blockbatch.models.model import Model
from blockbatch.models.tokenizer import IncrementalDecoder
from blockbatch.trace import Record, TraceRecorder

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Result:
    """One decoded request.

    Attributes:
        text: `tokens` as text; None if the model has no tokenizer.
        tokens: the winner's ids before the first EOS.
        canvas: all gen_length ids of the winner; MASK where it stopped early.
        nfe: model forwards: init, block, refresh, total.
        stop_reason: "eos" or "length".
        block_size: of the winning branch.
        branches: what each branch did.
        seconds: from the start of the batch to the end of this request.
        trace: one record for each forward (see `blockbatch.trace`); None unless the config asks for it.
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    nfe: branches.NFE
    stop_reason: str
    block_size: int
    branches: tuple[branches.BranchResult, ...]
    seconds: float
    trace: list[Record] | None


def generate(
    model: Model, prompt: Prompt | Sequence[Prompt], config: DecodeConfig | None = None
) -> Result | list[Result]:
    """Decodes one prompt or several.

    Several prompts run together as far as the cache allows; each gives the tokens that it gives alone, as far
    as the matrix library computes a row the same way in any batch.

    Args:
        model: from `load_model`.
        prompt: text, token ids, or a list of either. Text is encoded as it is: no chat template is added.
        config: defaults to `DecodeConfig()`.

    Returns:
        one `Result` for one prompt, else a list.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what was expected and what came.
        MemoryError: the cache of a single request does not fit.
    """
    config = DecodeConfig() if config is None else config
    prompts, single = _prompts(model, prompt)
    for index, ids in enumerate(prompts):
        check_prompt(model, ids, config, "prompt" if single else f"prompt[{index}]")
    results: list[Result] = []
    for batch in _batches(model, prompts, config):
        session = _session(model, batch, config)
        recorder = TraceRecorder(session.state) if config.trace else None
        while (step := session.step()) is not None:
            if recorder:
                recorder.add(step)
        for request in range(len(batch)):
            trace = recorder.traces[request] if recorder else None
            results.append(build_result(model, session, request, trace))
    return results[0] if single else results


def stream(model: Model, prompt: Prompt, config: DecodeConfig | None = None) -> Iterator[str]:
    """Yields the text of one prompt piece by piece, as its prefix becomes final.

    A position is final once every branch holds the same token there: merges and commits only write where
    nothing stands, and a sync copies one branch's canvas over another's. The pieces together are
    `generate(...).text`.
    """
    config = DecodeConfig() if config is None else config
    if model.tokenizer is None:
        raise ValueError("model: expected a model with a tokenizer to stream text, got one without")
    prompts, single = _prompts(model, prompt)
    if not single:
        raise ValueError(f"prompt: expected one prompt, got a list of {len(prompts)}")
    # A generator function would put the checks off until the first piece is asked for.
    return _stream(model, open_session(model, prompts[0], config))


def _stream(model: Model, session: Session) -> Iterator[str]:
    eos_token_ids = session.params.eos_token_ids
    decoder = IncrementalDecoder(model.tokenizer)
    emitted = 0
    while session.step() is not None:
        prefix = _before_eos(final_prefix(session), eos_token_ids)
        if piece := decoder.push(prefix[emitted:]):
            yield piece
        emitted = max(emitted, len(prefix))
    tokens = _before_eos(branches.read_outcome(session.state, 0).canvas, eos_token_ids)
    if piece := decoder.push(tokens[emitted:]) + decoder.finish():
        yield piece


def final_prefix(session: Session, request: int = 0) -> list[int]:
    """The longest prefix of a request's generation region on which all its branches agree."""
    state = session.state
    tokens = state.tokens.view(state.num_requests, state.num_branches, -1)[request]
    agreed = (tokens == tokens[0]).all(0) & (tokens[0] != session.params.mask_token_id)
    length = int(agreed.int().cumprod(0).sum())
    return tokens[0, :length].tolist()


def open_session(model: Model, ids: list[int], config: DecodeConfig) -> Session:
    """A session of one prompt's token ids, for callers that want to look between the forwards.

    Raises what `generate` raises.
    """
    check_prompt(model, ids, config, "prompt")
    (batch,) = _batches(model, [ids], config)
    return _session(model, batch, config)


def _session(model: Model, prompts: list[list[int]], config: DecodeConfig) -> Session:
    method = METHOD_BUILDERS[config.method](config, model.spec, _eos_token_ids(model, config))
    return Session(model, prompts, method, config.gen_length)


def _eos_token_ids(model: Model, config: DecodeConfig) -> tuple[int, ...]:
    ids = model.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    for token in ids:
        if not 0 <= token < model.spec.vocab_size:
            raise ValueError(
                f"eos_token_ids: expected ids from 0 to {model.spec.vocab_size - 1}, got {token}"
            )
    return ids


def _prompts(model: Model, prompt: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether one prompt came rather than a list of them."""
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [_encode(model, prompt, "prompt")], True
    if not isinstance(prompt, Sequence):
        raise TypeError(f"prompt: expected text, token ids or a list of either, got {type(prompt).__name__}")
    if all(_is_id(item) for item in prompt):
        return [[int(item) for item in prompt]], True
    return [_encode(model, item, f"prompt[{index}]") for index, item in enumerate(prompt)], False


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _encode(model: Model, prompt: Prompt, name: str) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(
                f"{name}: expected token ids, since the model's folder has no tokenizer; got text"
            )
        return model.tokenizer.encode(prompt)
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or not all(_is_id(item) for item in prompt):
        raise TypeError(f"{name}: expected text or token ids, got {prompt!r:.80}")
    return [int(item) for item in prompt]


def check_prompt(model: Model, ids: list[int], config: DecodeConfig, name: str) -> None:
    """Raises ValueError if a prompt's ids cannot be decoded; `name` is what the message calls it."""
    spec = model.spec
    if not ids and spec.prediction_offset:
        raise ValueError(f"{name}: expected at least one token for {spec.family}, got an empty prompt")
    for position, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{name}: expected ids from 0 to {spec.vocab_size - 1}, got {token} at {position}"
            )
        if token == spec.mask_token_id:
            raise ValueError(f"{name}: expected no MASK token (id {token}), got one at position {position}")
    canvas = len(ids) + config.gen_length
    if canvas > spec.max_length:
        raise ValueError(
            f"{name}: expected prompt and gen_length to fit in {spec.max_length} positions, got {len(ids)} + "
            f"{config.gen_length} = {canvas}"
        )


def _batches(model: Model, prompts: list[list[int]], config: DecodeConfig) -> Iterator[list[list[int]]]:
    """As many prompts at a time as `cache_bytes`, or else the free memory, has room for."""
    num_branches = len(config.block_sizes) if config.block_sizes else 1
    limit, source, purpose = model.cache_bytes, "cache_bytes", "the K/V cache"
    if limit is None:
        limit, source = _free_bytes(model.device), f"free memory of {model.device}"
        purpose = "the K/V cache and a forward"

    def needed(requests: int, longest: int) -> int:
        rows, length = requests * num_branches, longest + config.gen_length
        cache = kv_cache.cache_bytes(
            rows,
            length,
            num_layers=model.spec.num_layers,
            num_kv_heads=model.spec.num_kv_heads,
            head_dim=model.spec.head_dim,
            dtype=model.dtype,
        )
        if model.cache_bytes is not None:
            return cache
        # A refresh may compute every row whole.
        return cache + transformer.activation_bytes(model.spec, model.dtype, rows * length)

    for ids in prompts:
        if needed(1, len(ids)) > limit:
            raise MemoryError(
                f"{source}: expected at least {needed(1, len(ids)):,} bytes for {purpose} of "
                f"{num_branches} branches of {len(ids) + config.gen_length} positions, got {limit:,}"
            )
    batch: list[list[int]] = []
    for ids in prompts:
        longest = max(len(other) for other in [*batch, ids])
        if batch and needed(len(batch) + 1, longest) > limit:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else None
    return int(pages * os.sysconf("SC_PAGE_SIZE") * 0.9) if pages else 2**40


def _before_eos(tokens: list[int], eos_token_ids: tuple[int, ...]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[:position]
    return tokens


def build_result(model: Model, session: Session, request: int, trace: list[Record] | None = None) -> Result:
    """The result of a finished request of a session."""
    outcome = branches.read_outcome(session.state, request)
    tokens = _before_eos(outcome.canvas, session.params.eos_token_ids)
    return Result(
        text=model.tokenizer.decode(tokens) if model.tokenizer else None,
        tokens=tokens,
        canvas=outcome.canvas,
        nfe=outcome.nfe,
        stop_reason=outcome.stop_reason,
        block_size=outcome.branches[outcome.winner].block_size,
        branches=outcome.branches,
        seconds=session.seconds[request],
        trace=trace,
    )
