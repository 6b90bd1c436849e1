"""`generate` and `stream`: prompts in, results out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch

from blockbatch import memory
from blockbatch.config import DecodeConfig
from blockbatch.decoding import (
    BLOCK_METHOD_BUILDERS,
    METHOD_BUILDERS,
    BlockSession,
    Method,
    RunnerPool,
    Session,
)
from blockbatch.decoding.block_diffusion import BlockMethod, warn_of_size
from blockbatch.decoding.block_forward import BlockForward
from blockbatch.models.model import Model
from blockbatch.result import Result
from blockbatch.stops import PrefixReader, StopSequences, cut
from blockbatch.tracing import Record, open_recorder

Prompt = str | Sequence[int]


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
    _check_stop(model, config)
    results: list[Result] = []
    for batch in memory.batches(model, prompts, config):
        session = _session(model, batch, config)
        recorder = open_recorder(session, config)
        while (step := session.step()) is not None:
            if recorder:
                recorder.add(step)
        for request in range(len(batch)):
            trace = recorder.traces[request] if recorder else None
            results.append(build_result(model, session, request, trace))
        del session  # its buffers serve the next batch
    return results[0] if single else results


def stream(model: Model, prompt: Prompt, config: DecodeConfig | None = None) -> Iterator[str]:
    """Yields the text of one prompt piece by piece, as its prefix becomes final.

    A position is final once every branch holds the same token there. The pieces together are
    `generate(...).text`.
    """
    config = DecodeConfig() if config is None else config
    if model.tokenizer is None:
        raise ValueError("model: expected a model with a tokenizer to stream text, got one without")
    prompts, single = _prompts(model, prompt)
    if not single:
        raise ValueError(f"prompt: expected one prompt, got a list of {len(prompts)}")
    # A generator function would put the checks off until the first piece is asked for.
    return _stream(model, open_session(model, prompts[0], config), config)


def _stream(model: Model, session: Session | BlockSession, config: DecodeConfig) -> Iterator[str]:
    reader = PrefixReader(model.tokenizer, config.stop, session.params.eos_token_ids)
    length = 0
    while session.step() is not None:
        if piece := reader.push(final_prefix(session)):
            length += len(piece)
            yield piece
    if rest := build_result(model, session, 0).text[length:]:
        yield rest


def final_prefix(session: Session | BlockSession, request: int = 0) -> list[int]:
    """The longest prefix of a request's generation region on which all its branches agree."""
    return session.final_prefixes()[request]


def open_session(model: Model, ids: list[int], config: DecodeConfig) -> Session | BlockSession:
    """A session of one prompt's token ids, for callers that want to look between the forwards.

    Raises what `generate` raises.
    """
    check_prompt(model, ids, config, "prompt")
    _check_stop(model, config)
    (batch,) = memory.batches(model, [ids], config)
    return _session(model, batch, config)


def _session(model: Model, prompts: list[list[int]], config: DecodeConfig) -> Session | BlockSession:
    method = check_method(model, config)
    stops = None
    if config.stop:
        eos_token_ids = _eos_token_ids(model, config)
        stops = StopSequences(model.tokenizer, config.stop, eos_token_ids, len(prompts))
    if model.spec.block_size is not None:
        pool = memory.page_pool(model)
        if model.device.type == "cuda":
            # Captured steps are of no use once the pool has moved.
            pool.reserve(memory.first_pages(method, list(map(len, prompts))))
        if model.block_forward is None:
            model.block_forward = BlockForward(weakref.proxy(model), pool)
        warn_of_size(method)
        return BlockSession(model, prompts, method, model.block_forward, observed=config.trace, stops=stops)
    if model.device.type == "cpu":
        return Session(model, prompts, method, config.gen_length, observed=config.trace, stops=stops)
    if model.runners is None:
        model.runners = RunnerPool()
    longest = max(len(prompt) for prompt in prompts)
    max_prompt = memory.longest_prompt(model.device, longest)
    if not model.runners.has(len(prompts), method, config.gen_length, max_prompt):
        needed = sum(memory.needs(model, config, len(prompts), longest))
        model.runners.make_room(needed, memory.free_bytes(model) - model.runners.idle_bytes())
    return model.runners.open_session(
        model, prompts, method, config.gen_length, max_prompt, observed=config.trace, stops=stops
    )


def check_method(model: Model, config: DecodeConfig) -> Method | BlockMethod:
    """The method of `config` for the model; ValueError if the model cannot run it."""
    builders = METHOD_BUILDERS if model.spec.block_size is None else BLOCK_METHOD_BUILDERS
    if config.method not in builders:
        kind = "full" if model.spec.block_size is None else "block-causal"
        raise ValueError(
            f"method: expected {' or '.join(builders)} for {model.spec.family}, whose attention is {kind}, "
            f"got {config.method!r}"
        )
    if config.trace_kv and model.spec.block_size is not None:
        raise ValueError(
            f"trace_kv: expected False for {model.spec.family}, whose stored K/V never change, got True"
        )
    return builders[config.method](config, model.spec, _eos_token_ids(model, config))


def _check_stop(model: Model, config: DecodeConfig) -> None:
    if not config.stop:
        return
    if model.tokenizer is None:
        raise ValueError("stop: expected a model with a tokenizer to find texts, got one without")
    for text in config.stop:
        if model.tokenizer.token_to_id(text) == model.spec.mask_token_id:
            raise ValueError(f"stop: expected texts that can be decoded, got the MASK token {text!r}")


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
    method = check_method(model, config)
    if not ids and spec.prediction_offset:
        raise ValueError(f"{name}: expected at least one token for {spec.family}, got an empty prompt")
    for position, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{name}: expected ids from 0 to {spec.vocab_size - 1}, got {token} at {position}"
            )
        if token == spec.mask_token_id:
            raise ValueError(f"{name}: expected no MASK token (id {token}), got one at position {position}")
    if spec.block_size is not None:
        _check_blocks(model, ids, method, name)
        return
    canvas = len(ids) + config.gen_length
    if canvas > spec.max_length:
        raise ValueError(
            f"{name}: expected prompt and gen_length to fit in {spec.max_length} positions, got {len(ids)} + "
            f"{config.gen_length} = {canvas}"
        )


def _check_blocks(model: Model, ids: list[int], method: BlockMethod, name: str) -> None:
    """That the text fits in the model's positions: its first block where it may grow, else all of it."""
    size, most = method.block_size, model.spec.max_length
    positions = (len(ids) // size + 1) * size if method.grow else method.positions(len(ids))
    if positions > most:
        raise ValueError(
            f"{name}: expected prompt and gen_length in whole blocks of {size} to fit in {most} positions, "
            f"got {len(ids)} + {method.gen_length}, which take {positions}"
        )


def _before_eos(tokens: list[int], eos_token_ids: tuple[int, ...]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[:position]
    return tokens


def build_result(
    model: Model, session: Session | BlockSession, request: int, trace: list[Record] | None = None
) -> Result:
    """The result of a finished request of a session."""
    outcome = session.outcome(request)
    tokens, stop_reason = outcome.canvas, outcome.stop_reason
    if session.stops is not None:
        tokens, text, stopped = cut(
            model.tokenizer, tokens, session.stops.texts, session.params.eos_token_ids
        )
        stop_reason = "stop" if stopped else stop_reason
    else:
        tokens = _before_eos(tokens, session.params.eos_token_ids)
        text = model.tokenizer.decode(tokens) if model.tokenizer else None
    return Result(
        text=text,
        tokens=tokens,
        canvas=outcome.canvas,
        nfe=outcome.nfe,
        stop_reason=stop_reason,
        block_size=outcome.branches[outcome.winner].block_size,
        branches=outcome.branches,
        seconds=session.seconds[request],
        trace=trace,
        prefix_tokens=outcome.prefix_tokens,
    )
