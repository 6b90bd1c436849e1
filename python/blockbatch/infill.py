"""`fill`: texts with gaps in, whole texts out. What is given stands, in front of a gap and behind it.

Behind the first gap given tokens are part of the canvas, as if a branch had decoded them: their K/V is
computed by full forwards, every query sees them, and no rule writes there. `docs/infilling.md` says the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from blockbatch import gaps
from blockbatch.config import DecodeConfig
from blockbatch.decoding.choice import method_for
from blockbatch.decoding.prompt_checks import check_stop
from blockbatch.generation import Configs, Ended, decode_group, each_config, each_number
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.prompts import Prompt, check_ids, encode_prompt, read_each
from blockbatch.result import FillResult, Gap
from blockbatch.stops import cut
from blockbatch.texts import check_text
from blockbatch.tracing import Record


class GappedText(NamedTuple):
    """A text with gaps.

    Attributes:
        ids: its tokens, MASK in the gaps.
        written: for stretches of given tokens (start, end) the text that they were made of.
    """

    ids: list[int]
    written: dict[tuple[int, int], str]


def fill(
    model: Model, text: Prompt | Sequence[Prompt], config: Configs = None
) -> FillResult | list[FillResult]:
    """Decodes the gaps of one text or of several; what is given stands, and text may follow behind a gap.

    ::

        result = blockbatch.fill(model, "def double(x):\\n    return {8}\\n")
        print(result.text)

    Several texts of equally long canvases (from the first gap to the end) run together.

    Args:
        model: of full attention: LLaDA or Dream. Dream needs a token in front of the first gap.
        text: text with gaps, `{8}` for one of 8 tokens, `{{` and `}}` for braces; or token ids with MASK in
            the gaps; or a list of either.
        config: as of `generate`, of any method. How long a gap is, the text says: of `gen_length` only the
            ratio to `steps` counts. Gaps are decoded to their end, whatever `eos_exit` says. `stop` cuts each
            gap where it first stands in that gap.

    Returns:
        one `FillResult` for one text, else a list.

    Raises:
        as `generate`; ValueError also for a text without gaps, a brace that stands alone, and a model whose
        attention is causal across blocks.
    """
    texts, single = read_each(text, "text", lambda given, name: read_text(model, given, name))
    if single and config is not None and not isinstance(config, DecodeConfig):
        raise TypeError(f"config: expected a DecodeConfig for one text, got {type(config).__name__}")
    names = ["text"] if single else [f"text[{index}]" for index in range(len(texts))]
    whole = [given if isinstance(given, GappedText) else GappedText(given, {}) for given in texts]
    results = decode(model, whole, config, names)
    return results[0] if single else results


def read_text(model: Model, text: str, name: str = "text", *, add_bos: bool | None = None) -> GappedText:
    """A text with gaps as tokens; each stretch of given text is encoded by itself.

    Args:
        name: what messages call it.
        add_bos: as of `prompts.encode_prompt`, for what stands in front of the first gap.
    """
    check_text(text, name)
    parts = gaps.split(text, name, model.spec.max_length)
    if not parts or isinstance(parts[0], int):
        parts.insert(0, "")
    ids: list[int] = []
    written: dict[tuple[int, int], str] = {}
    for index, part in enumerate(parts):
        start = len(ids)
        if isinstance(part, int):
            ids += [model.spec.mask_token_id] * part
        else:
            ids += encode_prompt(model, part, name, add_bos=add_bos if index == 0 else False)
            written[start, len(ids)] = part
    return GappedText(ids, written)


def decode(
    model: Model, texts: Sequence[GappedText], config: Configs = None, names: Sequence[str] | None = None
) -> list[FillResult]:
    """The results of texts that are tokens already, as `fill` gives them.

    Args:
        names: what messages call the texts; None: text[0], text[1] and so on.
    """
    names = names or [f"text[{index}]" for index in range(len(texts))]
    if is_block_causal(model.spec):
        raise ValueError(
            f"model: expected one of full attention, LLaDA or Dream, to fill gaps, got {model.spec.family}, "
            "whose attention is causal across blocks: a gap does not see the text behind its block"
        )
    configs = [own.for_model(model.spec) for own in each_config(config, len(texts))]
    starts = [_check(model, text.ids, own, name) for text, own, name in zip(texts, configs, names)]
    groups: dict[tuple[DecodeConfig, int], list[int]] = {}
    for index, (text, own) in enumerate(zip(texts, configs)):
        length = len(text.ids) - starts[index]
        groups.setdefault((_settings(own, length), length), []).append(index)
    prompts = [text.ids[:start] for text, start in zip(texts, starts)]
    regions = [text.ids[start:] for text, start in zip(texts, starts)]
    numbers = each_number(config, len(texts))
    results: dict[int, FillResult] = {}

    def finish(session: Ended, request: int, index: int, trace: list[Record] | None) -> None:
        results[index] = _result(model, session, request, texts[index], trace)

    for (own, _), members in groups.items():
        decode_group(model, prompts, own, members, names, finish, regions, numbers=numbers)
    return [results[index] for index in range(len(texts))]


def _check(model: Model, ids: list[int], config: DecodeConfig, name: str) -> int:
    """The first gap's place in a text that can be decoded.

    Raises:
        ValueError: naming what cannot.
    """
    spec = model.spec
    method_for(model, config)
    check_ids(ids, spec.vocab_size, name)
    if spec.mask_token_id not in ids:
        raise ValueError(
            f"{name}: expected at least one gap, such as {{8}} in a text or MASK (id {spec.mask_token_id}) "
            "among ids, got none"
        )
    start = ids.index(spec.mask_token_id)
    if start == 0 and spec.prediction_offset:
        raise ValueError(
            f"{name}: expected at least one token before the first gap for {spec.family}, got none"
        )
    if len(ids) > spec.max_length:
        raise ValueError(
            f"{name}: expected a text that fits in {spec.max_length} positions with its gaps, got {len(ids)}"
        )
    check_stop(model, config)
    return start


def _settings(config: DecodeConfig, length: int) -> DecodeConfig:
    """The settings of a canvas: no EOS ends it, and of the block sizes beyond its length one is enough."""
    changes: dict[str, object] = {"eos_exit": "none"}
    if config.block_sizes is not None:
        beyond = sum(size >= length for size in config.block_sizes)
        changes["block_sizes"] = config.block_sizes[: len(config.block_sizes) - max(0, beyond - 1)]
    return replace(config, **changes)


def _result(
    model: Model, session: Ended, request: int, text: GappedText, trace: list[Record] | None
) -> FillResult:
    outcome = session.outcome(request)
    ids = text.ids[: len(text.ids) - len(outcome.canvas)] + outcome.canvas
    stop = () if session.stops is None else session.stops.texts
    tokens: list[int] = []
    pieces: list[str] = []
    found: list[Gap] = []
    stopped = False
    for start, end, is_gap in gaps.runs(text.ids, model.spec.mask_token_id):
        held, piece = ids[start:end], None
        if is_gap:
            held, piece, ended = _cut(model, held, stop, session.params.eos_token_ids)
            stopped |= ended
            found.append(Gap(start, end - start, held, piece))
        elif model.tokenizer is not None:
            piece = text.written.get((start, end))
            piece = model.tokenizer.decode(held) if piece is None else piece
        tokens += held
        pieces.append(piece or "")
    whole = None if model.tokenizer is None else "".join(pieces)
    if whole is not None and not text.written and not stopped:
        whole = model.tokenizer.decode(tokens)  # a character may lie on both sides of a gap's end
    return FillResult(
        text=whole,
        tokens=tokens,
        canvas=ids,
        nfe=outcome.nfe,
        stop_reason="stop" if stopped else outcome.stop_reason,
        block_size=outcome.branches[outcome.winner].block_size,
        branches=outcome.branches,
        seconds=session.seconds[request],
        trace=trace,
        gaps=tuple(found),
    )


def _cut(
    model: Model, held: list[int], stop: Sequence[str], ends: tuple[int, ...]
) -> tuple[list[int], str | None, bool]:
    """Ids and text of a gap before its first EOS or stop sequence, and whether a stop sequence cut it."""
    if model.tokenizer is not None:
        return cut(model.tokenizer, held, stop, ends)
    return held[: next((place for place, token in enumerate(held) if token in ends), len(held))], None, False
