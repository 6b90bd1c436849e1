"""Top token and its softmax probability, from logits that never exist or exist a chunk at a time."""

from collections.abc import Iterator

import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.gemm import is_aligned, kernel_exists
from blockbatch_kernels.cuda.gemm_fp8 import linear_fp8
from blockbatch_kernels.cuda.quantized import quantize_rows
from blockbatch_kernels.shapes import NUM_LIKELY

# Rows whose logits exist at the same time.
_SLICE_ROWS = 512
_PARTIAL_WORDS = 4  # LmHeadPartial in csrc/gemm/lm_head.h
_LIKELY_WORDS = 4 + 2 * NUM_LIKELY  # LmHeadLikelyPartial


@torch.no_grad()
def lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    probe_tokens: torch.Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The product and the reduction of its logits, on the current stream.

    `hidden` [predictions, dim] and `weight` [vocabulary, dim] (it may be a view of more rows) are CUDA
    tensors of one dtype (fp32, fp16 or bf16) and one device; the logits are rounded to it. With
    `weight_scale` [vocabulary] the weight is in e4m3. Returns top_token [predictions] int32, confidence
    [predictions] fp32 and, with `probe_tokens` [predictions] int32, probe_probability [predictions] fp32,
    else None. A probe outside of the vocabulary has probability NaN, and so has everything of a row whose
    logits hold NaN or plus infinity, or are all minus infinity.

    What `tuning.lm_head_tile` has a tile for runs, without probes, where the extension's product exists
    (sm_90; fp16 or bf16; rows aligned to 16 bytes), with 16 bytes of memory per row and 192 tokens of the
    vocabulary. Everything else goes through torch's product, or that of `linear_fp8`, in chunks of the
    vocabulary: `tuning.LM_HEAD_LOGITS_BYTES` of logits, or those of 512 rows x 4096 tokens if that is more,
    and 16 bytes per row and 4096 tokens.
    """
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    top_token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(confidence) if probe_tokens is not None else None
    if num_rows == 0:
        return top_token, confidence, probe_probability
    if vocab_size == 0:
        raise ValueError("weight: expected at least one row, got none")
    if probe_tokens is not None:
        probe_tokens = probe_tokens.contiguous()
    partials, piece_tokens = _partials(hidden, weight, weight_scale, suppress_token, probe_tokens)
    extension.load().lm_head_finish(
        partials=partials,
        probe_tokens=probe_tokens,
        top_token=top_token,
        confidence=confidence,
        probe_probability=probe_probability,
        piece_tokens=piece_tokens,
        vocab_size=vocab_size,
        stream=extension.stream_of(hidden),
    )
    return top_token, confidence, probe_probability


@torch.no_grad()
def lm_head_parts(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    first_token: int,
    weight_scale: torch.Tensor | None = None,
    probe_tokens: torch.Tensor | None = None,
    suppress_token: int | None = None,
) -> torch.Tensor:
    """What `lm_head_confidence` merges, of a part of the vocabulary that begins with `first_token`.

    `weight` [tokens, dim] is that part, with `weight_scale` [tokens] in e4m3; at least one token. Probes and
    the suppressed token are counted as those of the whole vocabulary, and may lie outside of the part.
    Returns [predictions, 4] fp32: the highest logit, the sum of exp(logit - highest), the lowest token that
    has it, and the probe's logit, or minus infinity.
    """
    parts = torch.empty(len(hidden), 4, dtype=torch.float32, device=hidden.device)
    if len(hidden) == 0:
        return parts
    own_probes = None
    if probe_tokens is not None:
        probe_tokens = probe_tokens.contiguous()
        own_probes = probe_tokens - first_token
    if suppress_token is not None:
        suppress_token -= first_token
        suppress_token = suppress_token if 0 <= suppress_token < len(weight) else None
    partials, piece_tokens = _partials(hidden, weight, weight_scale, suppress_token, own_probes)
    extension.load().lm_head_parts(
        partials=partials,
        probe_tokens=probe_tokens,
        parts=parts,
        first_token=first_token,
        piece_tokens=piece_tokens,
        vocab_size=len(weight),
        stream=extension.stream_of(hidden),
    )
    return parts


def _partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    suppress_token: int | None,
    probe_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """Reductions [rows, pieces, 4] of the logits, and tokens of a piece."""
    if weight_scale is None and probe_tokens is None and _product_takes(hidden, weight):
        return _partials_by_product(hidden, weight, suppress_token)
    return _partials_of_logits(hidden, weight, weight_scale, suppress_token, probe_tokens)


def _product_takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        tuning.lm_head_tile(hidden.shape[0], *weight.shape, device_kind=tuning.device_kind(hidden.device)) > 0
        and hidden.dtype != torch.float32
        and is_aligned(weight)
        and kernel_exists(hidden.device.index)
    )


def _partials_by_product(
    hidden: torch.Tensor, weight: torch.Tensor, suppress_token: int | None
) -> tuple[torch.Tensor, int]:
    """Reductions [rows, pieces, 4] of the logits, and tokens of a piece."""
    library = extension.load()
    if not is_aligned(hidden):
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    (num_rows, dim), vocab_size = hidden.shape, weight.shape[0]
    num_pieces = -(-vocab_size // library.LM_HEAD_TILE_TOKENS)
    partials = torch.empty(num_rows, num_pieces, _PARTIAL_WORDS, dtype=torch.float32, device=hidden.device)
    library.lm_head_product(
        hidden=hidden,
        weight=weight,
        partials=partials,
        suppress_token=suppress_token,
        tile_rows=tuning.lm_head_tile(
            num_rows, vocab_size, dim, device_kind=tuning.device_kind(hidden.device)
        ),
        stream=extension.stream_of(hidden),
    )
    return partials, library.LM_HEAD_TILE_TOKENS


def _partials_of_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    suppress_token: int | None,
    probe_tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """The same, from logits in memory."""
    library = extension.load()
    piece_tokens = library.LM_HEAD_PIECE_TOKENS
    partials = empty_partials(hidden, weight.shape[0], _PARTIAL_WORDS)
    for rows, token, logits in parts_of_logits(hidden, weight, weight_scale):
        library.lm_head_reduce(
            logits=logits,
            probe_tokens=None if probe_tokens is None else probe_tokens[rows],
            partials=partials[rows],
            first_token=token,
            suppress_token=suppress_token,
            stream=extension.stream_of(hidden),
        )
    return partials, piece_tokens


@torch.no_grad()
def lm_head_likely(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    suppress_token: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `blockbatch_kernels.ops.lm_head_likely`. Tensors as for `lm_head_confidence`, and the same way
    through torch's product in chunks of the vocabulary, with 48 bytes per row and 4096 tokens."""
    num_rows = hidden.shape[0]
    top_token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    likely_token = torch.empty(num_rows, NUM_LIKELY, dtype=torch.int32, device=hidden.device)
    likely_probability = torch.empty_like(likely_token, dtype=torch.float32)
    results = top_token, confidence, likely_token, likely_probability
    if num_rows == 0:
        return results
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row, got none")
    library, stream = extension.load(), extension.stream_of(hidden)
    partials = empty_partials(hidden, weight.shape[0], _LIKELY_WORDS)
    for rows, token, logits in parts_of_logits(hidden, weight, weight_scale):
        library.lm_head_likely_reduce(
            logits=logits,
            partials=partials[rows],
            first_token=token,
            suppress_token=suppress_token,
            stream=stream,
        )
    library.lm_head_likely_finish(
        partials=partials,
        top_token=top_token,
        confidence=confidence,
        likely_token=likely_token,
        likely_probability=likely_probability,
        stream=stream,
    )
    return results


def empty_partials(hidden: torch.Tensor, vocab_size: int, words: int) -> torch.Tensor:
    num_pieces = -(-vocab_size // extension.load().LM_HEAD_PIECE_TOKENS)
    return torch.empty(hidden.shape[0], num_pieces, words, dtype=torch.float32, device=hidden.device)


def parts_of_logits(
    hidden: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None = None
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Some rows, the first of some tokens, and their logits; the next ones overwrite them."""
    quantised = None if weight_scale is None else quantize_rows(hidden)
    piece_tokens = extension.load().LM_HEAD_PIECE_TOKENS
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    slice_rows = min(num_rows, _SLICE_ROWS)
    piece_bytes = slice_rows * piece_tokens * hidden.element_size()
    chunk_tokens = min(vocab_size, max(1, tuning.LM_HEAD_LOGITS_BYTES // piece_bytes) * piece_tokens)
    workspace = hidden.new_empty(slice_rows * chunk_tokens)
    for row in range(0, num_rows, slice_rows):
        rows = hidden[row : row + slice_rows]
        for token in range(0, vocab_size, chunk_tokens):
            chunk = weight[token : token + chunk_tokens]
            logits = workspace[: rows.shape[0] * chunk.shape[0]].view(rows.shape[0], chunk.shape[0])
            if quantised is None:
                torch.mm(rows, chunk.t(), out=logits)
            else:
                own = (part[row : row + slice_rows] for part in quantised)
                scale = weight_scale[token : token + chunk_tokens]
                linear_fp8(*own, chunk, scale, out_dtype=logits.dtype, out=logits)
            yield slice(row, row + slice_rows), token, logits
