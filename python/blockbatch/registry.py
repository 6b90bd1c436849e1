"""Methods of one's own: rows of the table that settings, command line, evaluation and pictures read.

::

    def top_two(state, candidates, confidence):
        best = confidence.topk(2, dim=1).indices
        return torch.zeros_like(candidates).scatter(1, best, True)

    blockbatch.register_method("top_two", blockbatch.commit_rule(top_two))
    blockbatch.generate(model, prompt, blockbatch.DecodeConfig(method="top_two"))

`docs/custom_rules.md` tells more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from blockbatch.methods import BUILT_IN_METHODS, METHOD_OPTIONS, METHOD_TABLE, MethodRow

_BASE = "dual_cache"


def register_method(
    name: str,
    builder: Callable[..., Any],
    *,
    options: Mapping[str, Any] | None = None,
    title: str | None = None,
    summary: str | None = None,
    replace: bool = False,
) -> None:
    """Makes `DecodeConfig(method=name)` run what `builder` builds, for models with full attention.

    Args:
        name: letters, digits and "_".
        builder: called as `builder(config, spec, eos_token_ids)` before every decode: settings, the model's
            `ModelSpec`, and the ids that end its texts. It returns a `blockbatch.decoding.Method`.
            `blockbatch.commit_rule` makes one of a function.
        options: options of `DecodeConfig` that the method has, with their defaults: `eos_exit`, `block_size`
            or `block_sizes`, and others. None: those of the builder, if it is of `commit_rule`, else those
            of "dual_cache".
        title: what pictures call it; None: the name.
        summary: what it does, in one line, for help texts.
        replace: whether a method that was registered under this name may go.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a text, got {name!r}")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits and _, got {name!r}")
    if name in METHOD_OPTIONS and not (replace and is_registered(name)):
        kind = "registered already" if is_registered(name) else "built in"
        raise ValueError(f"name: expected one that is free, got {name!r}, which is {kind}")
    if not callable(builder):
        raise TypeError(f"builder: expected a function of (config, spec, eos_token_ids), got {builder!r}")
    for argument, text in (("title", title), ("summary", summary)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{argument}: expected a text, got {text!r}")
    if options is None:
        options = getattr(builder, "options", METHOD_OPTIONS[_BASE])
    METHOD_TABLE[name] = MethodRow(
        name=name,
        title=title or name,
        summary=summary or "a method of your own",
        module=getattr(builder, "__module__", ""),
        options=_checked_options(options),
        published={},
        builder=builder,
    )
    METHOD_OPTIONS[name] = METHOD_TABLE[name].options


def unregister_method(name: str) -> None:
    """Takes back `register_method`. Raises ValueError if no such method was registered."""
    if not is_registered(name):
        raise ValueError(f"name: expected a method that was registered, got {name!r}")
    del METHOD_TABLE[name], METHOD_OPTIONS[name]


def is_registered(name: str) -> bool:
    """Whether a method of this name came from `register_method`."""
    return name in METHOD_TABLE and METHOD_TABLE[name].builder is not None


def registered_methods() -> tuple[str, ...]:
    """The methods that came from `register_method`, in that order."""
    return tuple(name for name in METHOD_TABLE if is_registered(name))


def _checked_options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise TypeError(f"options: expected a mapping of options to their defaults, got {options!r}")
    known = dict.fromkeys(name for method in BUILT_IN_METHODS for name in METHOD_OPTIONS[method])
    for name in options:
        if name not in known:
            raise ValueError(f"options: expected some of {', '.join(known)}, got {name!r}")
    if "eos_exit" not in options:
        raise ValueError(f"options: expected eos_exit among them, got {', '.join(options) or 'none'}")
    if ("block_size" in options) == ("block_sizes" in options):
        raise ValueError(
            f"options: expected one of block_size and block_sizes among them, got {', '.join(options)}"
        )
    return dict(options)
