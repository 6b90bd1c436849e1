"""Keys of config.json and generation_config.json that make tokens special to a decode.

How tokens are chosen (temperature, penalties, steps, lengths) is the caller's, so these settings pass. A key
that bans, forces or gives a meaning to tokens is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blockbatch.models.spec import CheckpointError

# Names of ids that are read, or that a decode has no use for.
_IDS = ("mask", "eos", "pad", "bos", "unk", "sep", "cls", "decoder_start")
_GROWING = "DreamOn's canvas grows and shrinks while it decodes; here a canvas has a fixed length"
_BANS = "a decode here bans and forces no token"
_REFUSED = {
    **dict.fromkeys(("expand_token_id", "delete_token_id", "expand_budget"), _GROWING),
    **dict.fromkeys(("mask_expansion", "pad_delete_to_right", "delete_eos_token"), _GROWING),
    **dict.fromkeys(
        "suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids sequence_bias constraints "
        "forced_bos_token_id forced_eos_token_id forced_decoder_ids".split(),
        _BANS,
    ),
    "stop_strings": "what stops a text is named by the caller: `stop`",
}


def check_token_keys(config: Mapping[str, Any], source: str) -> None:
    """Refuse keys that give a meaning to tokens which no decode here knows.

    Args:
        config: the content of a config.json or generation_config.json.
        source: its name, for messages.

    Raises:
        CheckpointError: naming the file, the key and its value.
    """
    for key, value in config.items():
        if value is None or value is False or value in ([], {}, ""):
            continue
        what = _REFUSED.get(key)
        named = re.fullmatch(r"(\w+)_token_(?:id|ids|index)", key)
        if what is None and named and named[1] not in _IDS:
            what = "a decode here knows the tokens MASK, EOS, BOS and padding"
        if what is not None:
            raise CheckpointError(f"{source}: {key} must be null or absent ({what}), got {value!r:.100}")


def check_generation_config(
    generation: Mapping[str, Any], config: Mapping[str, Any], source: str = "generation_config.json"
) -> None:
    """The same of a generation_config.json, and that its MASK is the one of config.json.

    Raises:
        CheckpointError: naming the file, the key, what was expected and what came.
    """
    check_token_keys(generation, source)
    mask, own = generation.get("mask_token_id"), config.get("mask_token_id")
    if mask is not None and own is not None and mask != own:
        raise CheckpointError(f"{source}: mask_token_id must be that of config.json = {own!r}, got {mask!r}")
