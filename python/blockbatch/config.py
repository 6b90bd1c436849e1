"""The settings of a decode, validated when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from numbers import Integral
from typing import Any

from blockbatch import block_methods
from blockbatch.methods import (
    BLOCK_METHOD_TABLE,
    DEFAULT_GEN_LENGTH,
    DEFAULT_METHOD,
    METHOD_OPTIONS,
    METHODS,
    fitting_block_size,
    fitting_block_sizes,
    preset_options,
)
from blockbatch.option_checks import as_texts, as_tuple, checked_drafts, checked_int, checked_probability
from blockbatch.sampling_options import SAMPLING_NAMES, SamplingOptions, sampling_settings
from blockbatch.values import as_bool

COMMIT_RULES = ("threshold", "local_leap")
REFRESH_SCOPES = ("canvas", "generation")
QUERY_SPANS = ("window", "open")
# Rules of blockbatch; "published" stands for that of the model's family.
POLICIES = ("llada_published", "dream_published", "published")
# What Dream's published rule fixes.
_DREAM_FIXES = {
    "tail_threshold": None,
    "merge_threshold": 0.5,
    "refresh_scope": "canvas",
    "query_span": "window",
    "commit": "threshold",
}


class _Default:
    """Marks an option that was not given, which is not the same as one given as None."""

    def __repr__(self) -> str:
        return "default"


DEFAULT: Any = _Default()

_COMMON = ("method", "gen_length", "eos_token_ids", "stop", "trace", "trace_kv", *SAMPLING_NAMES)


@dataclass(frozen=True)
class DecodeConfig(SamplingOptions):
    """How to decode. Options that a method does not have must be left out (they read None afterwards).

    What is marked as ours is not part of what the method's authors published, and off by default;
    `decoding/ALGORITHM.md` has the exact rules, and what each option does to tokens, forwards and time.
    Numbers may be numpy's or torch's; they are kept as Python's. `temperature`, `seed`, `min_tokens` and what
    else says how tokens are drawn: see `SamplingOptions`.

    Attributes:
        method: a row of `blockbatch.methods`: "blockbatch", "vanilla", "prefix_cache", "dual_cache" or
            "local_leap"; "block_diffusion" for block-causal models, which also run "blockbatch"; or one that
            `blockbatch.register_method` made.
        gen_length: tokens to generate, G; a block-causal model ends with a whole block.
        block_sizes: blockbatch: one branch for each; every one divides `gen_length`. Left out: those of the
            paper, 4 to 128, that divide it; of a block-causal model those that divide its block.
        max_step_tokens: blockbatch: the windows of a block step hold at most so many tokens together. The
            largest of `block_sizes` are left out until their sum fits; the attribute then holds those that
            are left. None: no limit. Ours.
        block_size: baselines: size of the one block. Left out: 32, or the largest of 4, 8 and 16 that divides
            `gen_length`, or all of it.
        threshold: commit every MASK with at least this confidence, in (0, 1]. The cached baselines also take
            None: a fixed number of tokens each step, as vanilla.
        tail_threshold: blockbatch: what `threshold` is behind the first MASK of a window that is below
            `threshold`, from `threshold` to 1; None: the same. Ours.
        steps: vanilla, and the cached baselines without a threshold: forwards in all, the same number for
            every block. Left out: one token a step.
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
        policy: blockbatch: which published rule decides what is committed, merged and synced:
            "llada_published"; "dream_published", which the authors run on Dream (for models that predict the
            next position); or "published": the one of the model's family, settled when a decode begins.
        eos_exit: "prefix": stop when everything before the first EOS is decoded; "window": stop when a window
            that holds EOS is complete; "none": fill the canvas. Left out: as published, and for blockbatch
            as the policy has it (prefix for LLaDA, none for Dream; None until "published" is settled).
        commit: blockbatch: "threshold", or "local_leap" for LocalLeap's rule in its place.
        leap_radius, leap_threshold: LocalLeap: within this distance of a MASK at `threshold` a MASK commits
            at `leap_threshold` already (None: 0.75 for LLaDA, 0.8 for Dream).
        sub_block_size, block_cache, sampler, fuse_store, strict_published, max_length, prefix_cache:
            block_diffusion; these, and what it has beside them: see `blockbatch.block_methods`.
        eos_token_ids: ids that end a text; None: those of the model.
        stop: texts, or one text; a request ends once its text, as far as it is final, holds one, and is cut
            before it.
        trace: record every forward in `Result.trace`.
        trace_kv: with `trace`: also record where each branch's K/V cache goes (see `blockbatch.tracing`).

    Raises:
        ValueError, TypeError: naming the option, what was expected and what came.
    """

    method: str = DEFAULT_METHOD
    gen_length: int = DEFAULT_GEN_LENGTH
    block_sizes: tuple[int, ...] | None = DEFAULT
    max_step_tokens: int | None = DEFAULT
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
    policy: str | None = DEFAULT
    eos_exit: str | None = DEFAULT
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

        "paper" is the published rule of the method (BlockBatch unless `method` says otherwise). The defaults
        of this class are that rule too, but for BlockBatch on a Dream model, which "paper" decodes by the
        rule that the authors published for Dream. "fast" is ours, not published.

        Raises:
            ValueError, TypeError: there is no such preset, or as the class itself.
        """
        return cls(**preset_options(name, overrides))

    def for_model(self, spec: Any) -> DecodeConfig:
        """These settings for a model of this spec (`blockbatch.models.ModelSpec`), without "published" left.

        Raises:
            ValueError: a policy that the model cannot have, or an option that the policy does not have.
        """
        if getattr(spec, "block_size", None) is not None:  # inside a block there is one rule alone
            return replace(self, policy="llada_published") if self.policy == "published" else self
        if self.policy == "dream_published" and spec.prediction_offset != 1:
            raise ValueError(
                "policy: expected llada_published for a model that does not predict the next position "
                f"({spec.family}), got {self.policy!r}"
            )
        if self.policy != "published":
            return self
        policy = "dream_published" if spec.prediction_offset == 1 else "llada_published"
        return replace(self, policy=policy, eos_exit=DEFAULT if self.eos_exit is None else self.eos_exit)

    def __post_init__(self) -> None:
        from blockbatch_kernels import EOS_EXITS  # it imports torch, which no list of options should wait for

        if self.method not in METHOD_OPTIONS:
            names = ", ".join((*METHODS, *BLOCK_METHOD_TABLE))
            raise ValueError(f"method: expected one of {names}, got {self.method!r}")
        self._set_int("gen_length", 1)
        self._fill_defaults()
        if self.method in BLOCK_METHOD_TABLE:
            options = {name: getattr(self, name) for name in METHOD_OPTIONS[self.method]}
            for name, value in block_methods.checked(options).items():
                self._set(name, value)
        else:
            self._check_blocks()
            self._check_thresholds()
            self._check_cheaper_forwards()
            self._check_policy()
        free = self.method in BLOCK_METHOD_TABLE or (self.eos_exit is None and self.policy == "published")
        if self.eos_exit not in EOS_EXITS and not free:
            raise ValueError(f"eos_exit: expected one of {', '.join(EOS_EXITS)}, got {self.eos_exit!r}")
        if self.eos_token_ids is not None:
            ids = as_tuple("eos_token_ids", self.eos_token_ids)
            self._set("eos_token_ids", tuple(checked_int("eos_token_ids", token, 0) for token in ids))
        self._set("stop", as_texts("stop", self.stop))
        self._check_sampling(self.gen_length, self.drafts)
        for name in ("trace", "trace_kv"):
            flag = as_bool(getattr(self, name))
            if flag is None:
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
            self._set(name, flag)
        if self.trace_kv and not self.trace:
            raise ValueError("trace_kv: expected only together with trace, got trace_kv without it")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_int(self, name: str, least: int) -> None:
        self._set(name, checked_int(name, getattr(self, name), least))

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
            self._set(name, value)

    def has_default(self, name: str) -> bool:
        """Whether an option has the value that it has when it is left out."""
        value = self._default_of(name)
        if name == "block_sizes":
            value = self._within_budget(sorted(value))
        return getattr(self, name) == value

    def _default_of(self, name: str) -> Any:
        value = METHOD_OPTIONS[self.method][name]
        if name == "eos_exit" and self.policy in ("dream_published", "published"):
            value = "none" if self.policy == "dream_published" else None
        if name == "block_sizes":
            value = fitting_block_sizes(self.gen_length, value, self._step_limit())
        elif name == "block_size" and value is not None:
            value = fitting_block_size(self.gen_length, value)
        return value

    def _step_limit(self) -> int:
        """The largest block that a step has room for."""
        budget = self.max_step_tokens
        return (
            min(self.gen_length, budget) if isinstance(budget, Integral) and budget > 0 else self.gen_length
        )

    def _check_blocks(self) -> None:
        options = METHOD_OPTIONS[self.method]
        if "block_sizes" in options:
            sizes = as_tuple("block_sizes", self.block_sizes)
            if not sizes:
                raise ValueError("block_sizes: expected at least one size, got none")
            sizes = tuple(self._checked_block_size("block_sizes", size) for size in sizes)
            if len(set(sizes)) != len(sizes):
                raise ValueError(f"block_sizes: expected different sizes, got {sizes}")
            self._set("block_sizes", self._within_budget(sorted(sizes)))
            return
        self._set("block_size", self._checked_block_size("block_size", self.block_size))
        if "steps" in options:
            blocks = self.gen_length // self.block_size
            if self.steps is None:
                self._set("steps", self.gen_length)
            self._set_int("steps", 1)
            if self.steps % blocks or self.steps > self.gen_length:
                raise ValueError(
                    f"steps: expected a multiple of the {blocks} blocks, at most gen_length = "
                    f"{self.gen_length}, got {self.steps} (block_size is {self.block_size})"
                )

    def _checked_block_size(self, name: str, size: Any) -> int:
        size = checked_int(name, size, 1)
        if self.gen_length % size:
            raise ValueError(f"{name}: expected divisors of gen_length = {self.gen_length}, got {size}")
        return size

    def _within_budget(self, sizes: list[int]) -> tuple[int, ...]:
        """Of ascending sizes as many of the smallest as `max_step_tokens` has room for."""
        budget = self.max_step_tokens
        if budget is None:
            return tuple(sizes)
        budget = checked_int("max_step_tokens", budget, 1)
        self._set("max_step_tokens", budget)
        if budget < sizes[0]:
            raise ValueError(
                f"max_step_tokens: expected at least {sizes[0]}, the window of the smallest of block_sizes = "
                f"{tuple(sizes)}, got {budget}"
            )
        return tuple(size for size, total in zip(sizes, accumulate(sizes)) if total <= budget)

    def _check_policy(self) -> None:
        if "policy" in METHOD_OPTIONS[self.method] and self.policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.policy != "dream_published":
            return
        for name, only in _DREAM_FIXES.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(f'{name}: expected {only!r} with policy="{self.policy}", got {value!r}')
        if self.eos_exit == "window":
            raise ValueError(
                f'eos_exit: expected prefix or none with policy="{self.policy}", got {self.eos_exit!r}'
            )

    def _check_cheaper_forwards(self) -> None:
        options = METHOD_OPTIONS[self.method]
        for name, choices in (("refresh_scope", REFRESH_SCOPES), ("query_span", QUERY_SPANS)):
            if name in options and getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.drafts is None:
            return
        self._set("drafts", checked_drafts(self.drafts, self.block_size, self.query_span))

    def _check_thresholds(self) -> None:
        options = METHOD_OPTIONS[self.method]
        if "threshold" in options and not (self.threshold is None and "steps" in options):
            self._set_probability("threshold", above=0.0)
        if self.tail_threshold is not None:
            self._set_probability("tail_threshold", least=self.threshold)
        if self.merge_threshold is not None:
            # Below one half two different tokens could pass at the same position.
            self._set_probability("merge_threshold", least=0.5)
        if self.sync_threshold is not None:
            self._set_int("sync_threshold", 0)
        if self.refresh_interval is not None:
            self._set_int("refresh_interval", 1)
        if "commit" in options and self.commit not in COMMIT_RULES:
            raise ValueError(f"commit: expected one of {', '.join(COMMIT_RULES)}, got {self.commit!r}")
        if "leap_radius" in options:
            self._set_int("leap_radius", 1)
        if self.leap_threshold is not None:
            self._set_probability("leap_threshold", above=0.0)

    def _set_probability(self, name: str, *, above: float | None = None, least: float | None = None) -> None:
        self._set(name, checked_probability(name, getattr(self, name), above=above, least=least))


def decode_settings(config: DecodeConfig) -> dict[str, Any]:
    """The options that the method has, as they were used; of those that draw tokens the ones given."""
    names = ("gen_length", *METHOD_OPTIONS[config.method], "eos_token_ids", "stop")
    return {**{name: getattr(config, name) for name in names}, **sampling_settings(config)}
