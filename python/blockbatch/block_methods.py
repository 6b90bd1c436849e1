"""The method of block-causal models: its row, its options for the command line, and what they may be.

Options of `DecodeConfig(method="block_diffusion")`, beside `gen_length`, `eos_token_ids` and `stop`:

    block_size        of the mask; None: the trained one
    threshold         write what has more than this confidence; None: 0.85 for SDAR, 1 for Fast-dLLM v2
    steps             SDAR: denoise forwards a block, at most; None: as many as it has positions
    commit            SDAR: "dynamic" (all above `threshold`, at least the quota of `steps`), "static" (the
                      quota), "sequential" (the quota, from the left) or "all"; None: "dynamic"
    fuse_store        SDAR: a finished block is stored in the first forward of the next one, with the same
                      tokens in fewer forwards; False: forwards one by one, as published; None: on. Ours
    sub_block_size    Fast-dLLM v2: decoded one after the other in a block; None: 8
    block_cache       Fast-dLLM v2: keep the block's K/V and compute sub-blocks alone; None: off
    sampler           Fast-dLLM v2: "generate", or "batch" for the one of its evaluation, which ends a text at
                      the end of a block; None: "generate"
    strict_published  Fast-dLLM v2: also what looks like a defect of the published code: a prompt of exactly
                      one block is never read, and blocks that do not divide the trained one
    max_length        "limit": memory for `gen_length` is checked before any work; "grow": a text goes on
                      while there is memory, and ends with stop reason "length" where there is none
    prefix_cache      K/V of finished blocks are kept for requests that begin with the same tokens, and found
                      there
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockbatch.values import as_bool, as_float, as_int

COMMIT_RULES = ("dynamic", "static", "sequential", "all")
SAMPLERS = ("generate", "batch")
MAX_LENGTHS = ("limit", "grow")

# Of `methods.MethodRow`.
ROW: dict[str, Any] = dict(
    name="block_diffusion",
    title="block diffusion",
    summary="SDAR's and Fast-dLLM v2's decoding, K/V of finished blocks kept (arXiv 2503.09573)",
    module="blockbatch.decoding.block_diffusion",
    options={
        "block_size": None,
        "steps": None,
        "commit": None,
        "threshold": None,
        "sub_block_size": None,
        "block_cache": None,
        "sampler": None,
        "fuse_store": None,
        "strict_published": False,
        "max_length": "limit",
        "prefix_cache": False,
    },
    published={},
)
# Of `methods.OptionRow`: name, kind, what help shows for a value, help.
OPTION_ROWS = (
    ("sub_block_size", "integer", "N", "block_diffusion, Fast-dLLM v2: of the sub-blocks (8)"),
    ("block_cache", "switch", "on|off", "block_diffusion, Fast-dLLM v2: sub-blocks alone (off)"),
    ("sampler", "name", "NAME", "block_diffusion, Fast-dLLM v2: generate (default), or batch as evaluated"),
    ("fuse_store", "switch", "on|off", "block_diffusion, SDAR: store a block in the next one's forward (on)"),
    ("strict_published", "switch", "on|off", "block_diffusion, Fast-dLLM v2: published defects, too (off)"),
    ("max_length", "name", "MODE", "block_diffusion: limit (default): check room for all of it; or grow"),
    ("prefix_cache", "switch", "on|off", "block_diffusion: keep K/V for requests that begin alike (off)"),
)


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the method as plain values.

    Raises:
        ValueError, TypeError: naming the option, what was expected and what came.
    """
    found = dict(options)
    for name in ("block_size", "steps", "sub_block_size"):
        if found[name] is not None:
            found[name] = _count(name, found[name])
    if found["threshold"] is not None:
        value = as_float(found["threshold"])
        if value is None:
            raise TypeError(f"threshold: expected a number, got {found['threshold']!r}")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"threshold: expected a value from 0 to 1, got {value}")
        found["threshold"] = value
    for name, choices in (("commit", COMMIT_RULES), ("sampler", SAMPLERS), ("max_length", MAX_LENGTHS)):
        value = found[name]
        if value not in choices and not (value is None and name != "max_length"):
            raise ValueError(f"{name}: expected {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
    for name in ("block_cache", "fuse_store", "strict_published", "prefix_cache"):
        value = as_bool(found[name])
        if value is None and not (found[name] is None and name in ("block_cache", "fuse_store")):
            raise TypeError(f"{name}: expected True or False, got {found[name]!r}")
        found[name] = value
    return found


def _count(name: str, value: Any) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number
