"""What the arguments that lm-evaluation-harness hands over ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from blockbatch.config import DecodeConfig
from blockbatch.evaluation.presets import PRESETS, get_preset
from blockbatch.methods import DEFAULT_METHOD, METHOD_OPTIONS, PRESET_TABLE, preset_options
from blockbatch.texts import has_half

DEFAULT_GEN_LENGTH = 256
# The names under which tasks say how long a text may become, the first one given counts.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Filters of a distribution whose best token they never take away.
SAMPLING_FILTERS = ("top_p", "top_k", "min_p")


class Wishes(NamedTuple):
    """What a task asks of a text: where it ends and how many tokens it has at most."""

    until: tuple[str, ...]
    max_gen_toks: int

    @classmethod
    def read(cls, gen_kwargs: Mapping[str, Any]) -> Wishes:
        """From the generation arguments of a task.

        Raises:
            ValueError, TypeError: something else than greedy decoding is asked for, or a value is off.
        """
        known = ("until", "do_sample", "temperature", *LENGTH_NAMES, *SAMPLING_FILTERS)
        for name in gen_kwargs:
            if name not in known:
                raise ValueError(f"gen_kwargs: expected some of {', '.join(known)}, got {name!r}")
        sampled, temperature = gen_kwargs.get("do_sample"), gen_kwargs.get("temperature")
        # A temperature without sampling has no effect, as elsewhere in the harness.
        if sampled or (sampled is None and temperature):
            raise ValueError(
                f"gen_kwargs: expected greedy decoding (do_sample=False), got do_sample={sampled} and "
                f"temperature={temperature}"
            )
        until = gen_kwargs.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(text, str) for text in until):
            raise TypeError(f"until: expected texts, got {until!r}")
        lengths = [gen_kwargs[name] for name in LENGTH_NAMES if gen_kwargs.get(name) is not None]
        length = lengths[0] if lengths else DEFAULT_GEN_LENGTH
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"max_gen_toks: expected an integer of at least 1, got {length!r}")
        # An empty text would stand everywhere, half a character nowhere.
        return cls(tuple(text for text in until if text and not has_half(text)), length)


def decode_options(
    preset: str | None, options: Mapping[str, Any], decode_preset: str | None = None
) -> dict[str, Any]:
    """The arguments of `DecodeConfig` that `model_args` ask for.

    Args:
        preset: a benchmark of the paper, or settings of a decode where no benchmark is asked for.
        options: single arguments, which count most.
        decode_preset: settings of a decode, which count more than the benchmark's.

    Raises:
        ValueError: there is no such option or preset, or a sequence cannot be read.
    """
    known = [field.name for field in fields(DecodeConfig) if field.name not in ("stop", "trace", "trace_kv")]
    for name in options:
        if name not in known:
            raise ValueError(
                f"model_args: expected pretrained, preset, decode_preset or one of {', '.join(known)}, got "
                f"{name!r}"
            )
    # Of the two ways to write `model_args` one reads the word none, the other leaves it as it is.
    given = {name: None if str(value).lower() == "none" else value for name, value in options.items()}
    if "eos_exit" in given and given["eos_exit"] is None:
        given["eos_exit"] = "none"
    for name in ("block_sizes", "drafts", "eos_token_ids", "bad_token_ids"):
        if name in given:
            given[name] = _integers(name, given[name])
    if preset in PRESET_TABLE:
        if decode_preset is not None:
            raise ValueError(
                f"preset: expected one of {', '.join(PRESETS)} beside decode_preset={decode_preset}, got "
                f"{preset!r}"
            )
        preset, decode_preset = None, preset
    if decode_preset is not None:
        given = preset_options(decode_preset, given, "decode_preset")
    if preset is None:
        return given
    benchmark = get_preset(preset, (*PRESETS, *PRESET_TABLE))
    return {**benchmark.options(given.get("method", DEFAULT_METHOD), given.get("gen_length")), **given}


def _integers(name: str, value: Any) -> tuple[int, ...] | None:
    # A comma would end the argument: a text has colons in their place.
    parts = value.split(":") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        return None if parts is None else tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected integers such as 4:8:16, got {value!r}") from None


def length_unit(options: Mapping[str, Any], length: int) -> int:
    """What a length of about `length` must be a multiple of, so that the block sizes divide it.

    Sizes that are none are passed over: `DecodeConfig` refuses them.
    """
    defaults = METHOD_OPTIONS.get(options.get("method", DEFAULT_METHOD), {})
    if "block_sizes" in defaults:
        # Of the usual sizes none that a short text would have to be padded for.
        sizes = options.get("block_sizes") or [size for size in defaults["block_sizes"] if size <= length]
    else:
        sizes = [options.get("block_size", defaults.get("block_size", 1))]
    return math.lcm(*(size for size in sizes if isinstance(size, int) and size > 0))


def read_batch_size(value: int | str) -> int:
    """The number in `value`.

    Raises:
        ValueError: it holds none, or one below 1.
    """
    try:
        size = int(value)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {value!r}")
    return size
