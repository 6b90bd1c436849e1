"""The options that say how tokens are drawn and which may be drawn; every method has them.

docs/sampling.md has the exact rules.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any

from blockbatch.values import as_float, as_int, as_list

# Of `blockbatch_kernels.CONFIDENCES`, which would import torch.
CONFIDENCES = ("probability", "entropy", "margin")
_TEMPERATURES = (1e-3, 1e3)
_MOST_BIAS = 1e4
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Part of `DecodeConfig`. Left out, decoding is greedy: at each position the token of the highest logit.

    Attributes:
        temperature: 0: greedy; above: tokens are drawn from softmax(logits / temperature).
        top_p: draw among the highest tokens that reach this probability together, at the temperature, in
            (0, 1]; None: among all.
        top_k: draw among so many highest tokens; None: among all.
        seed: of the noise, from 0 to 2**63 - 1. The same seed gives the same tokens on any device and in any
            batch, as far as the logits are the same. Prompt i of a list of several takes
            `request_seed(seed, i)`.
        min_tokens: no EOS among the first so many tokens.
        eos_bias: added to the logit of every EOS; below 0 for longer texts.
        bad_token_ids: ids that are never written.
        confidence: what commit rules compare with their thresholds: "probability", the model's own of the
            token that was drawn; "entropy", exp(-entropy); "margin", the highest probability minus the
            second. All are those of temperature 1 and lie between 0 and 1.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    min_tokens: int = 0
    eos_bias: float = 0.0
    bad_token_ids: tuple[int, ...] = ()
    confidence: str = "probability"

    @property
    def is_plain(self) -> bool:
        """Whether predictions are the top token and its probability, for which kernels of their own exist."""
        changed = self.min_tokens or self.eos_bias or self.bad_token_ids
        return self.temperature == 0 and self.confidence == "probability" and not changed

    def _check_sampling(self, gen_length: int, drafts: tuple[int, ...] | None) -> None:
        """Keeps the options as Python's own; raises ValueError or TypeError."""
        found = {
            "temperature": _temperature(self.temperature),
            "top_p": None if self.top_p is None else _number("top_p", self.top_p),
            "top_k": None if self.top_k is None else _integer("top_k", self.top_k, 1),
            "seed": _integer("seed", self.seed, 0),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0),
            "eos_bias": _number("eos_bias", self.eos_bias),
            "bad_token_ids": _ids(self.bad_token_ids),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a value above 0 and at most 1, got {self.top_p}")
        if self.seed >= _SEEDS:
            raise ValueError(f"seed: expected at most 2**63 - 1, got {self.seed}")
        if self.min_tokens > gen_length:
            raise ValueError(f"min_tokens: expected at most gen_length = {gen_length}, got {self.min_tokens}")
        if not abs(self.eos_bias) <= _MOST_BIAS:
            raise ValueError(
                f"eos_bias: expected a number from {-_MOST_BIAS:g} to {_MOST_BIAS:g}, got {self.eos_bias}"
            )
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence: expected one of {', '.join(CONFIDENCES)}, got {self.confidence!r}")
        for name in ("top_p", "top_k"):
            value = getattr(self, name)
            if self.temperature == 0 and value is not None:
                raise ValueError(f"{name}: expected None at temperature 0, which draws nothing, got {value}")
        if self.temperature > 0 and drafts:
            raise ValueError(
                "drafts: expected None at a temperature above 0: no draft knows what will be drawn, "
                f"got {drafts}"
            )


SAMPLING_NAMES = tuple(field.name for field in fields(SamplingOptions))
# Of `methods.OptionRow`: name, kind, what help shows for a value, help, whether the word none is taken.
OPTION_ROWS = (
    ("temperature", "number", "T", "0 (default): the most probable tokens; above 0 they are drawn"),
    ("top_p", "number", "P", "draw among the highest tokens of this probability together (all)", True),
    ("top_k", "integer", "N", "draw among so many highest tokens (all)", True),
    ("seed", "integer", "N", "of what is drawn (0)"),
    ("min_tokens", "integer", "N", "no EOS among the first so many tokens (0)"),
    ("eos_bias", "number", "B", "added to the logit of EOS; below 0: longer texts (0)"),
    ("bad_token_ids", "integers", "1,2", "ids that are never written (none)"),
    (
        "confidence",
        "name",
        "NAME",
        "what thresholds compare: probability (default) of the token, entropy or margin",
    ),
)


def sampling_settings(config: Any) -> dict[str, Any]:
    """Those of the options that are not as they are when left out."""
    defaults = {field.name: field.default for field in fields(SamplingOptions)}
    return {name: getattr(config, name) for name, value in defaults.items() if getattr(config, name) != value}


def request_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a list of several that were given one seed.

    The first one has `seed` itself. The others follow from it by a hash, so that neither prompts nor nearby
    seeds share noise.
    """
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % _SEEDS


def _temperature(given: Any) -> float:
    value = _number("temperature", given)
    low, high = _TEMPERATURES
    if value != 0.0 and not low <= value <= high:
        raise ValueError(f"temperature: expected 0 or a number from {low:g} to {high:g}, got {given}")
    return value


def _number(name: str, given: Any) -> float:
    value = as_float(given)
    if value is None:
        raise TypeError(f"{name}: expected a number, got {given!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {given}")
    return value


def _integer(name: str, given: Any, least: int) -> int:
    value = as_int(given)
    if value is None:
        raise TypeError(f"{name}: expected an integer, got {given!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def _ids(given: Any) -> tuple[int, ...]:
    members = as_list(given) if not isinstance(given, (set, frozenset)) else sorted(given)
    if members is None:
        raise TypeError(f"bad_token_ids: expected a sequence of integers, got {given!r}")
    return tuple(dict.fromkeys(_integer("bad_token_ids", member, 0) for member in members))
