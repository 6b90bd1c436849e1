"""`commit_rule`: a builder for `register_method` out of a function that chooses what is committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockbatch.config import DecodeConfig
from blockbatch.decoding.choice import METHOD_BUILDERS
from blockbatch.decoding.method import Method
from blockbatch.decoding.rule import CHOSEN, CommitRule, RuleState
from blockbatch.methods import METHOD_OPTIONS
from blockbatch.models.spec import ModelSpec

BASES = ("dual_cache", "prefix_cache", "vanilla", "blockbatch")
# What says how a method commits, and so does not exist where a rule does that.
_OF_COMMITS = {
    "threshold", "tail_threshold", "steps", "drafts", "policy", "commit", "leap_radius", "leap_threshold",
}  # fmt: skip
# Those of them that a rule may have for itself.
READABLE = ("threshold", "leap_radius", "leap_threshold")


@dataclass(frozen=True)
class RuleBuilder:
    """What `commit_rule` returns; called by `method_for`."""

    rule: Callable[[RuleState, Tensor, Tensor], Tensor]
    base: str
    own: Mapping[str, Any]
    memory: Mapping[str, torch.dtype]
    graphs: bool

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method, with their defaults."""
        of_base = {
            name: default for name, default in METHOD_OPTIONS[self.base].items() if name not in _OF_COMMITS
        }
        return {**of_base, **self.own}

    def __call__(self, config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> Method:
        has = METHOD_OPTIONS[config.method]
        shared = {name: getattr(config, name) for name in self.options if name in has}
        given = {name: value for name, value in shared.items() if name not in _OF_COMMITS}
        base = DecodeConfig(method=self.base, gen_length=config.gen_length, **given)
        method = METHOD_BUILDERS[self.base](base, spec, eos_token_ids)
        params = replace(method.params, threshold=CHOSEN, steps_per_block=None)
        rule = CommitRule(
            config.method, self.rule, tuple(shared.items()), tuple(self.memory.items()), self.graphs
        )
        return method._replace(params=params, rule=rule)


def commit_rule(
    rule: Callable[[RuleState, Tensor, Tensor], Tensor],
    *,
    base: str = "dual_cache",
    options: Mapping[str, Any] | None = None,
    memory: Mapping[str, torch.dtype] | None = None,
    graphs: bool = True,
) -> RuleBuilder:
    """A builder for `register_method` of a method that commits what `rule` says, and else is `base`.

    After every forward `rule(state, candidates, confidence)` is called for all rows of the batch:

    * state: a `RuleState`: tokens, top tokens, windows, options, and what the rule keeps between forwards;
    * candidates: [R, G] bool, the MASKs of the open windows of the rows that were in the forward;
    * confidence: [R, G] float32, the probability of the top token at the candidates, 0 elsewhere;
    * returns: [R, G] bool on the same device: where the top token is written.

    What it chooses outside of the candidates is passed over. Where it chooses none in a row that has
    candidates, the surest of them is committed (the first on a tie), so that every decode ends.

    Args:
        rule: a row's choice should follow from that row alone: other rows are other branches and requests.
        base: what forwards compute and when: "dual_cache", "prefix_cache", "vanilla", or "blockbatch" with
            its branches, merges and syncs.
        options: of `READABLE`, those that the rule reads in `state.options`, with their defaults, such as
            {"threshold": 0.9}; the method has no others of them.
        memory: names and dtypes of [R, G] tensors that the rule keeps between forwards.
        graphs: whether its steps may be captured as CUDA graphs. Then Python runs once, and again with the
            next number of tokens: what changes from forward to forward belongs in tensors.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if not callable(rule):
        raise TypeError(f"rule: expected a function of (state, candidates, confidence), got {rule!r}")
    if base not in BASES:
        raise ValueError(f"base: expected one of {', '.join(BASES)}, got {base!r}")
    for name, given in (("options", options), ("memory", memory)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{name}: expected a mapping, got {given!r}")
    for name in options or ():
        if name not in READABLE:
            raise ValueError(f"options: expected some of {', '.join(READABLE)}, got {name!r}")
    for name, dtype in (memory or {}).items():
        if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
            raise TypeError(f"memory: expected names with dtypes, got {name!r}: {dtype!r}")
    if not isinstance(graphs, bool):
        raise TypeError(f"graphs: expected True or False, got {graphs!r}")
    return RuleBuilder(rule, base, dict(options or {}), dict(memory or {}), graphs)
