"""The header of a trace file: where its records come from, and what pictures need besides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockbatch.config import DecodeConfig, decode_settings

if TYPE_CHECKING:
    from blockbatch.models.model import Model
    from blockbatch.models.tokenizer import Tokenizer
    from blockbatch.result import Result


def trace_header(
    model: Model, prompt_ids: Sequence[int], config: DecodeConfig, result: Result
) -> dict[str, Any]:
    """What pictures need besides the records of a decode, and where the records come from.

    Returns:
        the header of a trace file: model, adapter, quantization and kv_dtype (where it has them), method,
        settings, gen_length, block_sizes (of the branches, in their order), winner_block_size, prompt (text;
        None without a tokenizer), prompt_tokens, mask_token_id, eos_token_ids, canvas (of the winner), text,
        pieces (the text of every token id that occurs, the ids as decimal strings; empty without a
        tokenizer), nfe, adopted, seconds, stop_reason, given (of a fill, whose prompt ends at the first gap:
        the canvas before the first forward, MASK in the gaps; else None).
    """
    tokenizer, config = model.tokenizer, config.for_model(model.spec)
    eos_token_ids = model.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    changes = [
        change
        for record in result.trace or ()
        for change in record["commits"] + record["merges"] + record.get("drafts", [])
    ]
    sizes = [branch.block_size for branch in result.branches]
    canvas, given = list(result.canvas), None
    if gaps := getattr(result, "gaps", ()):
        given = list(canvas)
        for gap in gaps:
            given[gap.start : gap.start + gap.length] = [model.spec.mask_token_id] * gap.length
        canvas, given = canvas[len(prompt_ids) :], given[len(prompt_ids) :]
        # One block may be larger than the canvas, which is whole then.
        sizes = [min(size, len(canvas)) for size in sizes]
    if getattr(model.spec, "block_size", None) is not None:
        # The text of a block-causal model may end before its last block does, and holds no fixed number.
        ends = [window[1] for record in result.trace or () for window in record["windows"]]
        ends += [1 + place for change in changes for place in change["positions"]]
        canvas += [model.spec.mask_token_id] * (max(*sizes, *ends, 1) - len(canvas))
    ids = {model.spec.mask_token_id, *eos_token_ids, *prompt_ids, *result.canvas}
    ids.update(token for change in changes for token in change["tokens"])
    quantization = getattr(model, "quantization", None)
    kv_dtype = None if getattr(model, "kv_scales", None) is None else "fp8"
    return {
        "model": model.name,
        **({"adapter": model.adapter} if getattr(model, "adapter", None) else {}),
        **({} if quantization is None else {"quantization": quantization}),
        **({} if kv_dtype is None else {"kv_dtype": kv_dtype}),
        "method": config.method,
        "settings": decode_settings(config),
        "gen_length": len(canvas),
        "block_sizes": sizes,
        "winner_block_size": min(result.block_size, len(canvas)),
        "prompt": None if tokenizer is None else tokenizer.decode(list(prompt_ids), skip_special=False),
        "prompt_tokens": list(prompt_ids),
        "mask_token_id": model.spec.mask_token_id,
        "eos_token_ids": list(eos_token_ids),
        "canvas": canvas,
        "text": result.text,
        "pieces": {} if tokenizer is None else _pieces(tokenizer, ids),
        "nfe": {**asdict(result.nfe), "total": result.nfe.total},
        "adopted": result.adopted,
        "seconds": result.seconds,
        "stop_reason": result.stop_reason,
        "given": given,
    }


def _pieces(tokenizer: Tokenizer, ids: set[int]) -> dict[str, str]:
    return {str(token): tokenizer.decode([token], skip_special=False) for token in sorted(ids)}
