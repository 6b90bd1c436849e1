"""The settings of a decode, validated when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from blockbatch.methods import BLOCK_METHOD_TABLE, DEFAULT_METHOD, METHOD_OPTIONS, METHODS, preset_options

COMMIT_RULES = ("threshold", "local_leap")
REFRESH_SCOPES = ("canvas", "generation")
QUERY_SPANS = ("window", "open")
# Of block_diffusion: SDAR's rules, Fast-dLLM v2's samplers, and how far a text may go.
BLOCK_COMMIT_RULES = ("dynamic", "static", "sequential", "all")
SAMPLERS = ("generate", "batch")
MAX_LENGTHS = ("limit", "grow")
# Rows of a request beside its branch.
MAX_DRAFTS = 31


class _Default:
    """Marks an option that was not given, which is not the same as one given as None."""

    def __repr__(self) -> str:
        return "default"


DEFAULT: Any = _Default()

_COMMON = ("method", "gen_length", "eos_token_ids", "stop", "trace", "trace_kv")


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Options that a method does not have must be left out (they read None afterwards).

    What is marked as ours is not part of what the method's authors published, and off by default;
    `decoding/ALGORITHM.md` has the exact rules, and what each option does to tokens, forwards and time.

    Attributes:
        method: a row of `blockbatch.methods`: "blockbatch", "vanilla", "prefix_cache", "dual_cache" or
            "local_leap"; "block_diffusion" for models whose attention is causal across blocks (SDAR,
            Fast-dLLM v2), which also run "blockbatch".
        gen_length: tokens to generate, G. Block-causal models end with a whole block: SDAR with the one that
            holds the last of them, Fast-dLLM v2 after `gen_length // block_size` blocks.
        block_sizes: blockbatch: one branch for each; every one divides `gen_length`. Left out: those of the
            paper, 4 to 128, that divide it; of a block-causal model those that divide its block.
        block_size: baselines: size of the one block. block_diffusion: of the mask; None: the trained one.
        threshold: commit every MASK with at least this confidence, in (0, 1]. The cached baselines also take
            None: a fixed number of tokens each step, as vanilla. block_diffusion: with more than this
            confidence; None: 0.85 for SDAR, 1 for Fast-dLLM v2.
        tail_threshold: blockbatch: what `threshold` is behind the first MASK of a window that is below
            `threshold`, from `threshold` to 1; None: the same. Ours.
        steps: vanilla, and the cached baselines without a threshold: forwards in all, the same number for
            every block. Left out: one token a step. block_diffusion, SDAR: denoise forwards a block, at most;
            None: as many as it has positions.
        merge_threshold: take another branch's token above this confidence, in [0.5, 1]; None: never.
        sync_threshold: a branch that trails the leader by more tokens takes over its state; None: never.
        refresh_interval: full forward after this many tokens of finished blocks; None: never.
        refresh_scope: blockbatch, dual_cache, local_leap: what a full forward behind the first one computes:
            the whole "canvas", or the "generation" region, which leaves the prompt's K/V as they are. Fewer
            milliseconds a refresh; tokens may differ. Ours.
        query_span: blockbatch, dual_cache, local_leap: what a block step computes: the "window", or "open":
            the MASKs of the window, and once more every token that was decoded since its K/V was computed.
            Fewer tokens a step, and no refresh needed; tokens may differ. Ours.
        drafts: dual_cache, local_leap: a block step also computes what the next one would see if the so many
            surest MASKs were committed, for each of these numbers, such as (1, 2). The same tokens in fewer,
            somewhat larger forwards. With `eos_exit="prefix"` drafts end before an EOS. None: no drafts.
            Ours.
        eos_exit: "prefix": stop when everything before the first EOS is decoded; "window": stop when a window
            that holds EOS is complete; "none": fill the canvas.
        commit: blockbatch: "threshold", or "local_leap" for LocalLeap's rule in its place. block_diffusion,
            SDAR: "dynamic" (all above `threshold`, at least the quota of `steps`), "static" (the quota),
            "sequential" (the quota, from the left) or "all"; None: "dynamic".
        leap_radius, leap_threshold: LocalLeap: within this distance of a MASK at `threshold` a MASK commits
            at `leap_threshold` already (None: 0.75 for LLaDA, 0.8 for Dream).
        sub_block_size: block_diffusion, Fast-dLLM v2: decoded one after the other in a block; None: 8.
        block_cache: block_diffusion, Fast-dLLM v2: keep the block's K/V and compute sub-blocks alone; None:
            off.
        sampler: block_diffusion, Fast-dLLM v2: "generate", or "batch" for the one of its evaluation, which
            ends a text at the end of a block; None: "generate".
        fuse_store: block_diffusion, SDAR: a finished block is stored in the first forward of the next one,
            with the same tokens in fewer forwards; False: forwards one by one, as published; None: on.
        strict_published: block_diffusion, Fast-dLLM v2: also what looks like a defect of the published code:
            a prompt of exactly one block is never read, and blocks that do not divide the trained one.
        max_length: block_diffusion: "limit": memory for `gen_length` is checked before any work; "grow": a
            text goes on while there is memory and ends with stop reason "length" where there is none.
        prefix_cache: block_diffusion: K/V of finished blocks are kept for requests that begin with the same
            tokens, and found there.
        eos_token_ids: ids that end a text; None: those of the model.
        stop: texts; a request ends once its text, as far as it is final, holds one, and is cut before it.
        trace: record every forward in `Result.trace`.
        trace_kv: with `trace`: also record where each branch's K/V cache goes (see `blockbatch.tracing`).

    Raises:
        ValueError, TypeError: naming the option, what was expected and what came.
    """

    method: str = DEFAULT_METHOD
    gen_length: int = 256
    block_sizes: tuple[int, ...] | None = DEFAULT
    block_size: int | None = DEFAULT
    threshold: float | None = DEFAULT
    tail_threshold: float | None = DEFAULT
    steps: int | None = DEFAULT
    merge_threshold: float | None = DEFAULT
    sync_threshold: int | None = DEFAULT
    refresh_interval: int | None = DEFAULT
    refresh_scope: str | None = DEFAULT
    query_span: str | None = DEFAULT
    drafts: tuple[int, ...] | None = DEFAULT
    eos_exit: str = DEFAULT
    commit: str | None = DEFAULT
    leap_radius: int | None = DEFAULT
    leap_threshold: float | None = DEFAULT
    sub_block_size: int | None = DEFAULT
    block_cache: bool | None = DEFAULT
    sampler: str | None = DEFAULT
    fuse_store: bool | None = DEFAULT
    strict_published: bool | None = DEFAULT
    max_length: str | None = DEFAULT
    prefix_cache: bool | None = DEFAULT
    eos_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    trace: bool = False
    trace_kv: bool = False

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DecodeConfig:
        """The settings of a row of `blockbatch.methods.PRESET_TABLE`, with some of them changed.

        "paper" is the published rule of the method (BlockBatch unless `method` says otherwise), as are the
        defaults of this class. "fast" is ours, not published.

        Raises:
            ValueError, TypeError: there is no such preset, or as the class itself.
        """
        return cls(**preset_options(name, overrides))

    def __post_init__(self) -> None:
        from blockbatch_kernels import EOS_EXITS  # it imports torch, which no list of options should wait for

        if self.method not in METHOD_OPTIONS:
            names = ", ".join((*METHODS, *BLOCK_METHOD_TABLE))
            raise ValueError(f"method: expected one of {names}, got {self.method!r}")
        _check_int("gen_length", self.gen_length, 1)
        self._fill_defaults()
        if self.method in BLOCK_METHOD_TABLE:
            self._check_block_diffusion()
        else:
            self._check_blocks()
            self._check_thresholds()
            self._check_cheaper_forwards()
        if "eos_exit" in METHOD_OPTIONS[self.method] and self.eos_exit not in EOS_EXITS:
            raise ValueError(f"eos_exit: expected one of {', '.join(EOS_EXITS)}, got {self.eos_exit!r}")
        if self.eos_token_ids is not None:
            ids = _as_tuple("eos_token_ids", self.eos_token_ids)
            for token in ids:
                _check_int("eos_token_ids", token, 0)
            object.__setattr__(self, "eos_token_ids", ids)
        object.__setattr__(self, "stop", _as_texts("stop", self.stop))
        if not isinstance(self.trace, bool):
            raise TypeError(f"trace: expected True or False, got {self.trace!r}")
        if not isinstance(self.trace_kv, bool):
            raise TypeError(f"trace_kv: expected True or False, got {self.trace_kv!r}")
        if self.trace_kv and not self.trace:
            raise ValueError("trace_kv: expected only together with trace, got trace_kv without it")

    def _fill_defaults(self) -> None:
        options = METHOD_OPTIONS[self.method]
        for field in fields(self):
            name = field.name
            if name in _COMMON:
                continue
            value = getattr(self, name)
            if name not in options:
                if value is not DEFAULT and value is not None:
                    known = ", ".join(options)
                    raise ValueError(
                        f"{name}: not an option of {self.method} (it has {known}), got {value!r}"
                    )
                value = None
            elif value is DEFAULT:
                value = self._default_of(name)
            object.__setattr__(self, name, value)

    def _check_blocks(self) -> None:
        options = METHOD_OPTIONS[self.method]
        if "block_sizes" in options:
            sizes = _as_tuple("block_sizes", self.block_sizes)
            if not sizes:
                raise ValueError("block_sizes: expected at least one size, got none")
            for size in sizes:
                self._check_block_size("block_sizes", size)
            if len(set(sizes)) != len(sizes):
                raise ValueError(f"block_sizes: expected different sizes, got {sizes}")
            object.__setattr__(self, "block_sizes", tuple(sorted(sizes)))
            return
        self._check_block_size("block_size", self.block_size)
        if "steps" in options:
            blocks = self.gen_length // self.block_size
            if self.steps is None:
                object.__setattr__(self, "steps", self.gen_length)
            _check_int("steps", self.steps, 1)
            if self.steps % blocks or self.steps > self.gen_length:
                raise ValueError(
                    f"steps: expected a multiple of the {blocks} blocks, at most gen_length = "
                    f"{self.gen_length}, got {self.steps}"
                )

    def _check_block_size(self, name: str, size: Any) -> None:
        _check_int(name, size, 1)
        if self.gen_length % size:
            raise ValueError(f"{name}: expected divisors of gen_length = {self.gen_length}, got {size}")

    def _check_block_diffusion(self) -> None:
        for name in ("block_size", "steps", "sub_block_size"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if self.threshold is not None:
            _check_probability("threshold", self.threshold, least=0.0)
        for name, choices in (
            ("commit", BLOCK_COMMIT_RULES),
            ("sampler", SAMPLERS),
            ("max_length", MAX_LENGTHS),
        ):
            value = getattr(self, name)
            if value not in choices and not (value is None and name != "max_length"):
                raise ValueError(
                    f"{name}: expected {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
                )
        for name in ("block_cache", "fuse_store", "strict_published", "prefix_cache"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name in ("block_cache", "fuse_store")):
                raise TypeError(f"{name}: expected True or False, got {value!r}")

    def has_default(self, name: str) -> bool:
        """Whether an option has the value that it has when it is left out."""
        return getattr(self, name) == self._default_of(name)

    def _default_of(self, name: str) -> Any:
        value = METHOD_OPTIONS[self.method][name]
        if name == "block_sizes":
            value = tuple(size for size in value if self.gen_length % size == 0) or (self.gen_length,)
        return value

    def _check_cheaper_forwards(self) -> None:
        options = METHOD_OPTIONS[self.method]
        for name, choices in (("refresh_scope", REFRESH_SCOPES), ("query_span", QUERY_SPANS)):
            if name in options and getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.drafts is None:
            return
        drafts = _as_tuple("drafts", self.drafts)
        for length in drafts:
            _check_int("drafts", length, 1)
        if not drafts or sorted(set(drafts)) != list(drafts) or len(drafts) > MAX_DRAFTS:
            raise ValueError(f"drafts: expected 1 to {MAX_DRAFTS} ascending numbers, got {drafts}")
        if drafts[-1] >= self.block_size:
            raise ValueError(
                f"drafts: expected numbers below block_size = {self.block_size}, since a draft leaves a "
                f"MASK, got {drafts[-1]}"
            )
        if self.query_span != "window":
            raise ValueError(
                f'drafts: expected query_span="window", where a draft computes just what the next forward '
                f"would, got {self.query_span!r}"
            )
        object.__setattr__(self, "drafts", drafts)

    def _check_thresholds(self) -> None:
        options = METHOD_OPTIONS[self.method]
        if "threshold" in options and not (self.threshold is None and "steps" in options):
            _check_probability("threshold", self.threshold, above=0.0)
        if self.tail_threshold is not None:
            _check_probability("tail_threshold", self.tail_threshold, least=self.threshold)
        if self.merge_threshold is not None:
            # Below one half two different tokens could pass at the same position.
            _check_probability("merge_threshold", self.merge_threshold, least=0.5)
        if self.sync_threshold is not None:
            _check_int("sync_threshold", self.sync_threshold, 0)
        if self.refresh_interval is not None:
            _check_int("refresh_interval", self.refresh_interval, 1)
        if "commit" in options and self.commit not in COMMIT_RULES:
            raise ValueError(f"commit: expected one of {', '.join(COMMIT_RULES)}, got {self.commit!r}")
        if "leap_radius" in options:
            _check_int("leap_radius", self.leap_radius, 1)
        if self.leap_threshold is not None:
            _check_probability("leap_threshold", self.leap_threshold, above=0.0)


def decode_settings(config: DecodeConfig) -> dict[str, Any]:
    """The options that the method has, as they were used."""
    names = ("gen_length", *METHOD_OPTIONS[config.method], "eos_token_ids", "stop")
    return {name: getattr(config, name) for name in names}


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_probability(
    name: str, value: Any, *, above: float | None = None, least: float | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    low_enough = value > above if above is not None else value >= least
    if not (low_enough and value <= 1.0):
        bounds = f"above {above:g} and at most 1" if above is not None else f"from {least:g} to 1"
        raise ValueError(f"{name}: expected a value {bounds}, got {value}")


def _as_tuple(name: str, value: Any) -> tuple:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of integers, got {value!r}")
    return tuple(value)


def _as_texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of texts, got {value!r}")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected texts, got {text!r}")
        if not text:
            raise ValueError(f"{name}: expected texts of at least one character, got an empty one")
    return texts
