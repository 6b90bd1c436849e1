"""`generate` and `stream`: prompts in, results out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockbatch import block_memory, devices, gaps, memory
from blockbatch.config import DecodeConfig
from blockbatch.decoding import BlockSession, NonFiniteLogitsError, RunnerPool, Session
from blockbatch.decoding.block_diffusion import warn_of_size
from blockbatch.decoding.choice import eos_token_ids, method_for, sampling_for
from blockbatch.decoding.prompt_checks import check_prompt, check_stop
from blockbatch.decoding.results import build_result
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.prompts import Prompt, read_prompts
from blockbatch.result import Result
from blockbatch.stops import PrefixReader, StopSequences
from blockbatch.streaming import Stream
from blockbatch.tracing import Record, TraceRecorder, open_recorder
from blockbatch.values import as_list

# One for all prompts, or one for each.
Configs = DecodeConfig | Sequence[DecodeConfig] | None
Ended = Session | BlockSession


def generate(
    model: Model, prompt: Prompt | Sequence[Prompt], config: Configs = None
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
        config: defaults to `DecodeConfig()`. Of several prompts each may have its own, of any method: a list
            as long as that of the prompts. Those of equal settings run together.

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
    if single and config is not None and not isinstance(config, DecodeConfig):
        raise TypeError(f"config: expected a DecodeConfig for one prompt, got {type(config).__name__}")
    results = decode(model, prompts, config, names)
    return results[0] if single else results


def decode(
    model: Model,
    prompts: Sequence[list[int]],
    config: Configs = None,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Result]:
    """The results of prompts that are token ids already, as `generate` gives them.

    Args:
        names: what messages call the prompts; None: prompt[0], prompt[1] and so on.
        numbers: prompt i has the seed `request_seed(config.seed, numbers[i])`; None: 0, 1 and so on, or 0
            for all where each has its own config.
    """
    if numbers is None:
        numbers = each_number(config, len(prompts))
    names = names or [f"prompt[{index}]" for index in range(len(prompts))]
    groups: dict[DecodeConfig, list[int]] = {}
    for index, own in enumerate(each_config(config, len(prompts))):
        groups.setdefault(own.for_model(model.spec), []).append(index)
    for own, members in groups.items():
        for index in members:
            check_prompt(model, prompts[index], own, names[index])
        check_stop(model, own)
    results: dict[int, Result] = {}

    def finish(session: Ended, request: int, index: int, trace: list[Record] | None) -> None:
        results[index] = build_result(model, session, request, trace)

    for own, members in groups.items():
        decode_group(model, prompts, own, members, names, finish, numbers=numbers)
    return [results[index] for index in range(len(prompts))]


def each_config(config: Configs, count: int) -> list[DecodeConfig]:
    """The settings of each of so many prompts."""
    if config is None or isinstance(config, DecodeConfig):
        return [DecodeConfig() if config is None else config] * count
    configs = as_list(config)
    if configs is None:
        raise TypeError(f"config: expected a DecodeConfig or a list of them, got {type(config).__name__}")
    for index, own in enumerate(configs):
        if not isinstance(own, DecodeConfig):
            raise TypeError(f"config[{index}]: expected a DecodeConfig, got {type(own).__name__}")
    if len(configs) != count:
        raise ValueError(f"config: expected one for each of {count} prompts, got {len(configs)}")
    return configs


def each_number(config: Configs, count: int) -> Sequence[int]:
    """What tells the noise of so many prompts apart: their places, unless each has settings of its own."""
    return range(count) if config is None or isinstance(config, DecodeConfig) else [0] * count


def decode_group(
    model: Model,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    members: list[int],
    names: Sequence[str],
    finish: Callable[[Ended, int, int, list[Record] | None], None],
    regions: Sequence[list[int]] | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Decodes prompts of the same settings, as many at a time as fit.

    Args:
        config: settled for the model, and checked.
        members: their places among `prompts`, `names`, `regions` and `numbers`.
        names: what messages call them.
        finish: called with the session at its end, the request, its place, and its trace if there is one.
        regions: as of `Session`, of equal length for all members.
        numbers: what their seeds are made with, see `decode`; None: their places.
    """
    while members:
        held = None if regions is None else [regions[index] for index in members]
        own = [index if numbers is None else numbers[index] for index in members]
        batch, session = _open(model, [prompts[index] for index in members], config, own, held)
        recorder = open_recorder(session, config)
        failed = _run(session, recorder)
        if failed is not None:
            del session, recorder
            index = members[failed.request]
            raise failed.of(names[index], index)
        for request, index in enumerate(members[: len(batch)]):
            finish(session, request, index, recorder.traces[request] if recorder else None)
        members = members[len(batch) :]
        del session, recorder  # its buffers serve the next batch


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


def stream(model: Model, prompt: Prompt, config: DecodeConfig | None = None) -> Stream:
    """The text of one prompt piece by piece, as its prefix becomes final.

    A position is final once every branch holds the same token there. The pieces together are
    `generate(...).text`; `result` of what is returned is that `Result` once the last piece was read. Left
    early, `with stream(...) as pieces` ends the decode.

    Raises:
        what `generate` raises, bad input before any work.
    """
    if config is not None and not isinstance(config, DecodeConfig):
        raise TypeError(f"config: expected a DecodeConfig for one prompt, got {type(config).__name__}")
    config = (DecodeConfig() if config is None else config).for_model(model.spec)
    if model.tokenizer is None:
        raise ValueError("model: expected a model with a tokenizer to stream text, got one without")
    prompts, single = read_prompts(model, prompt)
    if not single:
        raise ValueError(f"prompt: expected one prompt, got a list of {len(prompts)}")
    session = open_session(model, prompts[0], config)
    reader = PrefixReader(model.tokenizer, config.stop, session.params.eos_token_ids)
    return Stream(
        session,
        open_recorder(session, config),
        reader,
        lambda *ended: build_result(model, ended[0], 0, ended[1]),
    )


def final_prefix(session: Session | BlockSession, request: int = 0) -> list[int]:
    """The longest prefix of a request's generation region on which all its branches agree."""
    return session.final_prefixes()[request]


def open_session(model: Model, ids: list[int], config: DecodeConfig) -> Session | BlockSession:
    """A session of one prompt's token ids, for callers that want to look between the forwards.

    Raises what `generate` raises.
    """
    config = config.for_model(model.spec)
    check_prompt(model, ids, config, "prompt")
    check_stop(model, config)
    return _open(model, [ids], config, [0])[1]


def _open(
    model: Model,
    prompts: Sequence[list[int]],
    config: DecodeConfig,
    numbers: Sequence[int],
    regions: Sequence[list[int]] | None = None,
) -> tuple[list[list[int]], Session]:
    """The first prompts, as many as fit, and their session."""
    with devices.turn(model.device), devices.memory_errors(model.device, "the K/V cache"):
        if regions is None:
            batch = memory.first_batch(model, list(prompts), config)
            return batch, _session(model, batch, config, numbers[: len(batch)])
        batch = memory.first_batch(model, list(prompts), config, len(regions[0]))
        return batch, _session(model, batch, config, numbers[: len(batch)], regions[: len(batch)])


def _session(
    model: Model,
    prompts: list[list[int]],
    config: DecodeConfig,
    numbers: Sequence[int] | None = None,
    regions: Sequence[list[int]] | None = None,
) -> Session | BlockSession:
    method = method_for(model, config)
    sampling = None
    if method.sampling is not None:
        numbers = range(len(prompts)) if numbers is None else numbers
        sampling = [sampling_for(model, config, number) for number in numbers]
    stops = None
    if config.stop:
        ends = eos_token_ids(model, config)
        spans = None if regions is None else [gaps.last(held, model.spec.mask_token_id) for held in regions]
        stops = StopSequences(model.tokenizer, config.stop, ends, len(prompts), spans)
    if is_block_causal(model.spec):
        warn_of_size(method)
        lengths = [len(prompt) for prompt in prompts]
        forward = block_memory.open_forward(model, method, lengths, memory.free_bytes(model))
        options = dict(observed=config.trace, stops=stops, sampling=sampling)
        return BlockSession(model, prompts, method, forward, **options)
    gen_length = config.gen_length if regions is None else len(regions[0])
    options = dict(observed=config.trace, stops=stops, regions=regions, sampling=sampling)
    if model.device.type == "cpu":
        return Session(model, prompts, method, gen_length, **options)
    if model.runners is None:
        model.runners = RunnerPool()
    longest = max(len(prompt) for prompt in prompts)
    max_prompt = memory.longest_prompt(model.device, longest)
    shape = (len(prompts), method, gen_length, max_prompt)
    needed = memory.needs(model, config, len(prompts), longest, region=gen_length)
    more = sum(needed) - (needed.cache if model.runners.has(*shape) else 0)
    model.runners.make_room(more, memory.free_bytes(model) - model.runners.idle_bytes(), keep=shape)
    return model.runners.open_session(model, prompts, *shape[1:], **options)
