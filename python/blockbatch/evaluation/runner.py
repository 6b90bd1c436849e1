"""Problems decoded by every setting, judged and recorded one after the other."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from blockbatch import generation, memory
from blockbatch.config import DecodeConfig
from blockbatch.decoding.choice import method_for
from blockbatch.environment import describe
from blockbatch.evaluation.progress import Clock, Progress
from blockbatch.evaluation.records import Record, RecordFile, Run
from blockbatch.evaluation.settings import Setting, settings_header
from blockbatch.generation import Result
from blockbatch.models import Model
from blockbatch.prompts import encode_prompt
from blockbatch.tasks import Problem
from blockbatch.texts import check_text
from blockbatch.tracing import save_trace, trace_header

logger = logging.getLogger(__name__)

# The first decodes of a process pay for memory and threads that later ones find ready; a short one is enough.
_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class _Prompt:
    problem: Problem
    ids: list[int]
    digest: str

    @property
    def name(self) -> str:
        return f"{self.problem.task} {self.problem.id}"


class _Job(NamedTuple):
    """Prompts that one setting decodes together."""

    setting: Setting
    prompts: list[_Prompt]

    @property
    def name(self) -> str:
        more = f" and {len(self.prompts) - 1} more" if len(self.prompts) > 1 else ""
        return f"{self.prompts[0].name}{more}: {self.setting.label}"


def run(
    model: Model,
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    path: str | os.PathLike,
    *,
    batch_size: int = 1,
    chat: bool = False,
    bos: bool = False,
    traces: str | os.PathLike | None = None,
    progress: Callable[[Progress], None] | None = None,
    fresh: bool = False,
    header: Mapping[str, Any] | None = None,
) -> Run:
    """Decodes every problem with every setting and appends a record of each decode to a file.

    It goes problem by problem, all settings within, so that a machine that is busy for a while slows
    all alike. A file of the same run is gone on with: what is recorded in it is not decoded again. More
    problems or a larger `Setting.limit` do not make it another run; another model, device, version of torch
    or setting does.

    Args:
        model: with a tokenizer; a GPU that it is on need not be the current one.
        problems: their task and id together name each. One whose prompt holds half a character is left out,
            with a warning.
        settings: with labels of their own.
        path: the file of records (see `records`).
        batch_size: problems that a setting decodes at once; the seconds of each are its share.
        chat: write prompts as a user's message in the model's chat format.
        bos: begin other prompts with the BOS token; False: as the tokenizer's settings say.
        traces: folder for the trace of every decode (None: none), named by task, id and label. Recording
            takes time that counts in `Record.seconds`.
        progress: called before every decode and at the end.
        fresh: drop what the file holds.
        header: more that a file to go on with must agree on, such as seeds.

    Returns:
        the records of these problems and settings, problem by problem.

    Raises:
        ValueError, TypeError: before any decode: a problem or an argument that cannot be used, or a file of
            another run (the message names the field).
        OSError: a file cannot be written, or another process is writing it.
    """
    _check(model, problems, settings, batch_size)
    prompts = _encode(model, problems, settings, chat, bos)
    trace_paths = None if traces is None else _trace_paths(Path(traces), problems, settings)
    options = {"batch_size": batch_size, "chat": chat, "traced": traces is not None}
    if bos:  # files from before there was the option go on
        options["bos"] = True
    full_header = {**describe_run(model), **options, **(header or {}), "settings": settings_header(settings)}
    with RecordFile(path, full_header, fresh=fresh) as file:
        records = {record.key: record for record in file.run.records}
        _check_prompts(records, prompts, file.path)
        jobs = list(_plan(prompts, settings, batch_size, records))
        pending: Counter[str] = Counter()
        for job in jobs:
            pending[job.setting.label] += len(job.prompts)
        known = ((record.setting, record.seconds) for record in records.values())
        clock = Clock(pending, known, progress)
        warm_up(
            model, ((job.setting.config, [prompt.ids for prompt in job.prompts]) for job in jobs), clock.tell
        )
        for job in jobs:
            clock.tell(job.name)
            begun = time.perf_counter()
            results, seconds = _decode(model, job, traced=traces is not None)
            if trace_paths is not None:
                _save_traces(model, job, results, trace_paths)
            new = [_record(*item, job.setting) for item in zip(job.prompts, results, seconds, strict=True)]
            file.append(new)
            records.update((record.key, record) for record in new)
            clock.add(job.setting.label, len(new), time.perf_counter() - begun)
        clock.tell("the report")
        keys = (
            (prompt.problem.task, prompt.problem.id, setting.label)
            for prompt, chosen in _chosen(prompts, settings)
            for setting in chosen
        )
        return Run(file.run.header, [records[key] for key in keys])


def describe_run(model: Model) -> dict[str, Any]:
    """Model, device, versions and time, for the header of a file."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model.name,
        **({"adapter": model.adapter} if model.adapter else {}),
        "dtype": model.numbers,
        "backend": model.backend,
        **describe(model.device),
    }


def warm_up(
    model: Model,
    decodes: Iterable[tuple[DecodeConfig, list[list[int]]]],
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Decodes once what would make the first of the given decodes slower than later ones of its kind.

    A GPU captures its steps once for each configuration, number of prompts and length of canvas that it has
    buffers for, and needs all of them. On a CPU a short decode by each method will do.
    """
    on_gpu = model.device.type == "cuda"
    warm = set()
    for config, prompts in decodes:
        room = memory.longest_prompt(model.device, max(map(len, prompts)))
        kind = (config, len(prompts), room) if on_gpu else config.method
        if kind in warm:
            continue
        warm.add(kind)
        tell(f"warming up: {config.method}")
        if on_gpu:
            generation.decode(model, prompts, config)
        else:
            gen_length = min(_WARM_UP_TOKENS, config.gen_length)
            one_block = {} if config.block_size is None else {"block_size": gen_length}
            short = DecodeConfig(method=config.method, gen_length=gen_length, **one_block)
            generation.decode(model, prompts[:1], short)


def _check(model: Model, problems: Sequence[Problem], settings: Sequence[Setting], batch_size: int) -> None:
    if model.tokenizer is None:
        raise ValueError("model: expected a model with a tokenizer, got one without")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size: expected an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    _check_names("problems", [(problem.task, problem.id) for problem in problems])
    _check_names("settings", [setting.label for setting in settings])
    for setting in settings:
        method_for(model, setting.config.for_model(model.spec))


def _check_names(argument: str, names: Sequence[Any]) -> None:
    if not names:
        raise ValueError(f"{argument}: expected at least one, got none")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{argument}: expected a name of its own for each, got {name!r} {count} times")


def _encode(
    model: Model, problems: Sequence[Problem], settings: Sequence[Setting], chat: bool, bos: bool
) -> list[_Prompt]:
    """All prompts as token ids, checked before the first is decoded; half characters leave a problem out."""
    prompts = []
    lengths = {setting.config.gen_length: setting.config for setting in settings}
    for problem in problems:
        name = f"{problem.task} {problem.id}"
        try:
            check_text(problem.prompt, f"problem {name}")
        except ValueError as error:
            logger.warning("%s; this problem is left out", error)
            continue
        text = model.tokenizer.chat(problem.prompt, model.spec.family) if chat else problem.prompt
        ids = encode_prompt(model, text, name, add_bos=False if chat else bos or None)
        digest = hashlib.blake2b(",".join(map(str, ids)).encode(), digest_size=6).hexdigest()
        prompts.append(_Prompt(problem, ids, digest))
        for config in lengths.values():
            generation.check_prompt(model, ids, config, prompts[-1].name)
    if not prompts:
        raise ValueError("problems: expected at least one of whole characters, got none")
    return prompts


def _check_prompts(records: Mapping[Any, Record], prompts: Sequence[_Prompt], path: Path) -> None:
    digests = {(prompt.problem.task, prompt.problem.id): prompt for prompt in prompts}
    for record in records.values():
        prompt = digests.get((record.task, record.problem))
        if prompt is not None and prompt.digest != record.prompt:
            raise ValueError(f"{path}: expected the same {prompt.name} as in the file, got another prompt")


def _chosen(
    prompts: Sequence[_Prompt], settings: Sequence[Setting]
) -> Iterable[tuple[_Prompt, list[Setting]]]:
    """Every prompt with the settings whose limit it is within."""
    seen: Counter[str] = Counter()
    for prompt in prompts:
        place = seen[prompt.problem.task]
        seen[prompt.problem.task] += 1
        yield prompt, [setting for setting in settings if setting.limit is None or place < setting.limit]


def _plan(
    prompts: Sequence[_Prompt],
    settings: Sequence[Setting],
    batch_size: int,
    records: Mapping[tuple[str, str, str], Record],
) -> Iterable[_Job]:
    """What remains to be decoded, batch by batch, all settings within."""
    chosen = list(_chosen(prompts, settings))
    for first in range(0, len(chosen), batch_size):
        for setting in settings:
            batch = [
                prompt
                for prompt, wanted in chosen[first : first + batch_size]
                if setting in wanted
                and (prompt.problem.task, prompt.problem.id, setting.label) not in records
            ]
            if batch:
                yield _Job(setting, batch)


def _decode(model: Model, job: _Job, traced: bool) -> tuple[list[Result], list[float]]:
    """The results, and the seconds of each."""
    config = replace(job.setting.config, trace=True) if traced else job.setting.config
    begun = time.perf_counter()
    # What is drawn for a problem depends on no other, nor on the size of batches.
    numbers = [int(prompt.digest, 16) for prompt in job.prompts]
    results = generation.decode(model, [prompt.ids for prompt in job.prompts], config, numbers=numbers)
    if len(results) == 1:
        return results, [results[0].seconds]
    share = (time.perf_counter() - begun) / len(results)
    return results, [share] * len(results)


def _record(prompt: _Prompt, result: Result, seconds: float, setting: Setting) -> Record:
    problem = prompt.problem
    return Record(
        task=problem.task,
        problem=problem.id,
        setting=setting.label,
        text=result.text,
        tokens=len(result.tokens),
        right=None if problem.is_right is None else bool(problem.is_right(result.text)),
        nfe={**asdict(result.nfe), "total": result.nfe.total},
        seconds=seconds,
        stop_reason=result.stop_reason,
        block_size=result.block_size,
        prompt=prompt.digest,
        adopted=result.adopted,
    )


def _save_traces(model: Model, job: _Job, results: Sequence[Result], paths: Mapping[Any, Path]) -> None:
    for prompt, result in zip(job.prompts, results, strict=True):
        problem, label = prompt.problem, job.setting.label
        path = paths[problem.task, problem.id, label]
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {"task": problem.task, "problem": problem.id, "setting": label, "answer": problem.answer}
        header = trace_header(model, prompt.ids, job.setting.config, result)
        save_trace(path, result.trace, **{**header, **names})


def _trace_paths(
    folder: Path, problems: Sequence[Problem], settings: Sequence[Setting]
) -> dict[tuple[str, str, str], Path]:
    """Where the trace of each decode goes; names of problems may hold what names of files must not."""
    paths: dict[tuple[str, str, str], Path] = {}
    owners: dict[Path, tuple[str, str, str]] = {}
    for problem in problems:
        for setting in settings:
            key = (problem.task, problem.id, setting.label)
            name = "_".join(re.sub(r"[^\w.+-]+", "-", part).strip(".") for part in key)
            path = folder / f"{name}.json"
            if path in owners:
                raise ValueError(
                    f"traces: expected names that differ in a file's name, got {owners[path]} and {key}"
                )
            owners[path] = key
            paths[key] = path
    return paths
