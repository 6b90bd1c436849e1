"""`generate` and `stream`: prompts in, results out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockbatch import block_memory, devices, memory
from blockbatch.config import DecodeConfig
from blockbatch.decoding import BlockSession, NonFiniteLogitsError, RunnerPool, Session
from blockbatch.decoding.block_diffusion import warn_of_size
from blockbatch.decoding.choice import eos_token_ids, method_for, sampling_for
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.prompts import Prompt, check_prompt, read_prompts
from blockbatch.result import Result
from blockbatch.stops import PrefixReader, StopSequences, cut
from blockbatch.tracing import Record, TraceRecorder, open_recorder


def generate(
    model: Model, prompt: Prompt | Sequence[Prompt], config: DecodeConfig | None = None
) -> Result | list[Result]:
    """Decodes one prompt or several.

    Several prompts run together as far as the cache allows; each gives the tokens that it gives alone, as far
    as the matrix library computes a row the same way in any batch.

    Where tokens are drawn (`temperature`), each prompt has noise of its own: that of its seed, which is the
    config's for one prompt, and `request_seed(config.seed, i)` for prompt i of a list.

    Several threads may decode with one model, each with the results that it has alone. On a GPU their
    forwards take turns, each on the current stream of its thread; see `blockbatch.devices`.

    Args:
        model: from `load_model`; its device need not be the current one.
        prompt: text, token ids, or a list of either; ids may be of numpy or torch. Text is encoded as it is:
            no chat template is added, and a beginning of text only where the tokenizer's settings ask for it
            (`add_bos_token`).
        config: defaults to `DecodeConfig()`.

    Returns:
        one `Result` for one prompt, else a list; an empty list for an empty list.

    Raises:
        ValueError, TypeError: before any work, naming the argument, what was expected and what came.
        MemoryError: what a single request needs does not fit, before any work; or the device ran out of
            memory all the same. The model stays usable.
        NonFiniteLogitsError: a forward of any prompt gave NaN or infinity; the model stays usable.
    """
    prompts, single = read_prompts(model, prompt)
    names = ["prompt"] if single else [f"prompt[{index}]" for index in range(len(prompts))]
    results = decode(model, prompts, config, names)
    return results[0] if single else results


def decode(
    model: Model,
    prompts: Sequence[list[int]],
    config: DecodeConfig | None = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Result]:
    """The results of prompts that are token ids already, as `generate` gives them.

    Args:
        names: what messages call the prompts; None: prompt[0], prompt[1] and so on.
        numbers: prompt i has the seed `request_seed(config.seed, numbers[i])`; None: 0, 1 and so on.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    config = (DecodeConfig() if config is None else config).for_model(model.spec)
    for index, ids in enumerate(prompts):
        check_prompt(model, ids, config, names[index] if names else f"prompt[{index}]")
    _check_stop(model, config)
    results: list[Result] = []
    while len(results) < len(prompts):
        rest = slice(len(results), None)
        batch, session = _open(model, prompts[rest], config, numbers[rest])
        recorder = open_recorder(session, config)
        failed = _run(session, recorder)
        if failed is not None:
            del session, recorder
            index = len(results) + failed.request
            raise failed.of(names[index] if names else f"prompt[{index}]", index)
        for request in range(len(batch)):
            trace = recorder.traces[request] if recorder else None
            results.append(build_result(model, session, request, trace))
        del session, recorder  # its buffers serve the next batch
    return results


def _run(session: Session, recorder: TraceRecorder | None) -> NonFiniteLogitsError | None:
    """Runs a session to its end. Returns the error if it ends by one: raised from here, its traceback would
    hold the session, and with it the cache that the next decode is to have."""
    try:
        while (step := session.step()) is not None:
            if recorder:
                recorder.add(step)
    except NonFiniteLogitsError as error:
        return error.with_traceback(None)
    return None


def stream(model: Model, prompt: Prompt, config: DecodeConfig | None = None) -> Iterator[str]:
    """Yields the text of one prompt piece by piece, as its prefix becomes final.

    A position is final once every branch holds the same token there. The pieces together are
    `generate(...).text`.
    """
    config = (DecodeConfig() if config is None else config).for_model(model.spec)
    if model.tokenizer is None:
        raise ValueError("model: expected a model with a tokenizer to stream text, got one without")
    prompts, single = read_prompts(model, prompt)
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
    config = config.for_model(model.spec)
    check_prompt(model, ids, config, "prompt")
    _check_stop(model, config)
    return _open(model, [ids], config, [0])[1]


def _open(
    model: Model, prompts: Sequence[list[int]], config: DecodeConfig, numbers: Sequence[int]
) -> tuple[list[list[int]], Session]:
    """The first prompts, as many as fit, and their session."""
    with devices.turn(model.device), devices.memory_errors(model.device, "the K/V cache"):
        batch = memory.first_batch(model, list(prompts), config)
        return batch, _session(model, batch, config, numbers[: len(batch)])


def _session(
    model: Model, prompts: list[list[int]], config: DecodeConfig, numbers: Sequence[int]
) -> Session | BlockSession:
    method = method_for(model, config)
    sampling = None
    if method.sampling is not None:
        sampling = [sampling_for(model, config, number) for number in numbers]
    stops = None
    if config.stop:
        ends = eos_token_ids(model, config)
        stops = StopSequences(model.tokenizer, config.stop, ends, len(prompts))
    if is_block_causal(model.spec):
        warn_of_size(method)
        lengths = [len(prompt) for prompt in prompts]
        forward = block_memory.open_forward(model, method, lengths, memory.free_bytes(model))
        return BlockSession(
            model, prompts, method, forward, observed=config.trace, stops=stops, sampling=sampling
        )
    options = dict(observed=config.trace, stops=stops, sampling=sampling)
    if model.device.type == "cpu":
        return Session(model, prompts, method, config.gen_length, **options)
    if model.runners is None:
        model.runners = RunnerPool()
    longest = max(len(prompt) for prompt in prompts)
    max_prompt = memory.longest_prompt(model.device, longest)
    shape = (len(prompts), method, config.gen_length, max_prompt)
    needed = memory.needs(model, config, len(prompts), longest)
    more = sum(needed) - (needed.cache if model.runners.has(*shape) else 0)
    model.runners.make_room(more, memory.free_bytes(model) - model.runners.idle_bytes(), keep=shape)
    return model.runners.open_session(model, prompts, *shape[1:], **options)


def _check_stop(model: Model, config: DecodeConfig) -> None:
    if not config.stop:
        return
    if model.tokenizer is None:
        raise ValueError("stop: expected a model with a tokenizer to find texts, got one without")
    for text in config.stop:
        if model.tokenizer.token_to_id(text) == model.spec.mask_token_id:
            raise ValueError(f"stop: expected texts that can be decoded, got the MASK token {text!r}")


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
