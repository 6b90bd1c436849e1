"""A loaded model: weights, tokenizer and the two forwards that everything else uses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch import devices
from blockbatch.kv_cache import KVCache
from blockbatch.models import likelihood, special_ids, transformer
from blockbatch.models.checkpoint import load_weights, read_config, read_spec, resolve_folder, stored_as
from blockbatch.models.drawn import Draw
from blockbatch.models.head import head_in_pieces, head_logits, head_predictions
from blockbatch.models.kv_scales import KVScales, calibrate, check_kv_dtype, dtype_of_cache
from blockbatch.models.likelihood import LogLikelihood
from blockbatch.models.lora import read_adapter
from blockbatch.models.placement import check_backend, check_whole_rows, device_of, dtype_of, limit_of
from blockbatch.models.quantized_weights import QUANTIZATIONS
from blockbatch.models.row_pack import packed_rows, pages_of_rows
from blockbatch.models.spec import ModelSpec
from blockbatch.models.tokenizer import Tokenizer, has_tokenizer
from blockbatch.models.weights import TransformerWeights, check_quantization, check_room, quantization_of
from blockbatch.parallel import WHOLE, RankShare, Share, group

if TYPE_CHECKING:
    from blockbatch.config import DecodeConfig
    from blockbatch.result import Result

_TINY = Path(__file__).resolve().parent.parent / "tiny"
BUILT_IN = {"tiny": _TINY / "checkpoint", "tiny-block": _TINY / "block_checkpoint"}


class Model:
    """A masked diffusion language model on one device. `load_model` makes one.

    Attributes:
        spec: the architecture.
        tokenizer: None for a folder without one; prompts are then token ids.
        eos_token_ids: ids that end a text, unless a config names others.
        device, dtype: of the weights and activations.
        quantization: "fp8" where the weights of the layers' products are in e4m3, "fp8-all" where the LM head
            is, too; else None.
        kv_scales: of K and V in e4m3 (`blockbatch.models.kv_scales`); None: the cache has the model's dtype.
        kv_dtype: torch dtype of the K/V cache.
        cache_bytes: the most memory that the K/V cache of a batch may take; None: what the device has free.
        pool, block_forward: pages and captured steps of a block-causal model; None before the first decode.
        adapter: folder of the LoRA that the weights hold; None: of none.
        runners: on a GPU the buffers and captured steps of earlier decodes; None before the first.
        share: what this process holds of the model; `spec` and `weights` are of that.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: TransformerWeights,
        tokenizer: Tokenizer | None,
        *,
        backend: str | None = None,
        cache_bytes: int | None = None,
        name: str = "model",
        share: Share = WHOLE,
        kv_scales: KVScales | None = None,
    ) -> None:
        self.spec, self.weights, self.tokenizer, self.backend = spec, weights, tokenizer, backend
        self.cache_bytes, self.name, self.share, self.kv_scales = cache_bytes, name, share, kv_scales
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.quantization = quantization_of(weights)
        self.eos_token_ids = special_ids.end_ids(spec, tokenizer)
        self.runners = None
        self.pool, self.block_forward = None, None
        self.adapter: str | None = None
        self._rope = transformer.rope_table(spec, self.device)

    @property
    def numbers(self) -> str:
        """What the model computes with, in words: "bfloat16", "bfloat16, layers in fp8, K/V in fp8"."""
        quantized = "" if self.quantization is None else f", {QUANTIZATIONS[self.quantization]} in fp8"
        cached = "" if self.kv_scales is None else ", K/V in fp8"
        return str(self.dtype).removeprefix("torch.") + quantized + cached

    @property
    def kv_dtype(self) -> torch.dtype:
        return dtype_of_cache(self.kv_scales, self.dtype)

    def new_cache(self, num_requests: int, num_branches: int, canvas_length: int) -> KVCache:
        return KVCache(
            num_requests,
            num_branches,
            canvas_length,
            num_layers=self.spec.num_layers,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.kv_dtype,
            device=self.device,
            backend=self.backend,
            scales=self.kv_scales,
        )

    def predict(
        self,
        packed: bbk.PackedQueries,
        cache: KVCache,
        seqlens_k: Tensor,
        probe_tokens: Tensor | None = None,
        *,
        likely: bool = False,
        sampling: Draw | None = None,
        fixed_tokens: int | None = None,
        after_attention: Callable[[int], None] | None = None,
    ) -> bbk.Predictions:
        """One forward of the packed queries.

        Args:
            packed: the queries, in the cache's slots.
            cache: *written* at the queries' slots.
            seqlens_k: [rows] int32, canvas lengths.
            probe_tokens: [predictions] int32, tokens whose probability is wanted too.
            likely: whether the tokens of a probability above 0.2 are wanted; then without probes.
            sampling: how tokens are drawn; None: those of the highest logits. MASK is never drawn.
            fixed_tokens, after_attention: see `transformer.forward`; the first also divides the number of
                predictions.
        """
        # Whole rows predict at few of their tokens, and no key or value comes behind the last attention. Of a
        # window nearly all tokens predict.
        few = fixed_tokens is None and 2 * packed.predict_index.shape[0] <= packed.input_ids.shape[0]
        hidden = transformer.forward(
            self.spec,
            self.weights,
            self._rope,
            packed,
            cache.kv,
            cache.page_table,
            seqlens_k,
            wanted=packed.predict_index if few else None,
            distinct_rows=cache.distinct_rows,
            num_branches=cache.num_branches,
            fixed_tokens=fixed_tokens,
            backend=self.backend,
            all_reduce_norm=self.share.all_reduce_norm,
            after_attention=after_attention,
            kv_scales=self.kv_scales,
        )
        hidden = hidden if few else hidden[packed.predict_index]
        target, operators = packed.predict_target, self.share.head
        head = functools.partial(
            head_predictions, operators, self.spec, self.weights.lm_head, likely, self.backend
        )
        return head_in_pieces(head, fixed_tokens, hidden, target, probe_tokens, sampling)

    def logits(self, input_ids: Tensor | Sequence[Sequence[int]], *, block_size: int | None = None) -> Tensor:
        """One full forward without a cache, in a turn of the device.

        Args:
            input_ids: [rows, length] integers (one row may be given flat).
            block_size: SDAR and Fast-dLLM v2: of the mask, counted from the first position; None: the trained
                one.

        Returns:
            [rows, length, vocab_size] in the model's dtype, as the model gives them: the logits of Dream and
            Fast-dLLM v2 at a position predict the next one.
        """
        block_size = self._mask_size(block_size)
        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.dim() == 1:
            ids = ids.unsqueeze(0)
        if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected integers [rows, length], got {ids.dtype} {list(ids.shape)}"
            )
        rows, length = ids.shape
        if length > self.spec.max_length:
            raise ValueError(f"input_ids: expected at most {self.spec.max_length} positions, got {length}")
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            raise ValueError(
                f"input_ids: expected ids from 0 to {self.spec.vocab_size - 1}, got {_range(ids)}"
            )
        with devices.turn(self.device), self.share.forward("logits"):
            return self._logits(ids, block_size)

    def _logits(self, ids: Tensor, block_size: int | None) -> Tensor:
        hidden = self.hidden_states(ids, block_size=block_size)
        part = head_logits(self.weights.lm_head, self.backend, hidden)
        return self.share.whole_logits(part).view(*ids.shape, -1)

    def hidden_states(
        self, ids: Tensor, wanted: Tensor | None = None, *, block_size: int | None = None
    ) -> Tensor:
        """One full forward without a cache, up to the final norm.

        Args:
            ids: [rows, length] integers of the vocabulary, at most `spec.max_length` positions.
            wanted: [n] int64, places in the flattened ids; None: all of them.
            block_size: of a block-causal mask; None: attention is bidirectional.

        Returns:
            [n, hidden_size]: those of the wanted places.
        """
        # The layers take turns on the same memory, since none looks back.
        kv = pages_of_rows(1, ids, self.spec, self.kv_dtype)
        return self._whole_rows(ids, kv.expand(self.spec.num_layers, -1, -1, -1, -1, -1), wanted, block_size)

    def keys_and_values(self, ids: Tensor) -> Tensor:
        """[layers, 2, rows, length, num_kv_heads, head_dim]: K after rotation and V of a forward of ids
        [rows, length], under the mask of the family."""
        kv = pages_of_rows(self.spec.num_layers, ids, self.spec, self.kv_dtype)
        with devices.turn(self.device), self.share.forward("keys_and_values"), torch.inference_mode():
            self._whole_rows(ids, kv, None, self.spec.block_size)
        return kv

    def _whole_rows(self, ids: Tensor, kv: Tensor, wanted: Tensor | None, block_size: int | None) -> Tensor:
        packed, page_table, seqlens_k = packed_rows(ids, block_size)
        return transformer.forward(
            self.spec,
            self.weights,
            self._rope,
            packed,
            kv,
            page_table,
            seqlens_k,
            wanted=wanted,
            backend=self.backend,
            all_reduce_norm=self.share.all_reduce_norm,
            kv_scales=self.kv_scales,
        )

    def log_likelihood(
        self,
        prompt: str | Sequence[int],
        answer: str | Sequence[int],
        *,
        samples: int = 128,
        seed: int = 0,
        rows: int = 32,
    ) -> LogLikelihood:
        """A bound on the log-probability of an answer; see `blockbatch.models.likelihood`.

        Args:
            prompt: text, or token ids. Dream needs at least one token in front of the answer.
            answer: text, or token ids. Of two texts the tokens are those of the whole text.
            samples: maskings of the answer.
            seed: of the maskings, which are the same on any device and for any `rows`.
            rows: maskings that are computed at a time.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        return likelihood.log_likelihood(self, prompt, answer, samples=samples, seed=seed, rows=rows)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        config: DecodeConfig | None = None,
        *,
        enable_thinking: bool | None = None,
    ) -> Result:
        """Decodes the assistant's next turn of one conversation.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]` with the roles system, user and assistant; a
                text is one user message. They are written in the format of the model's family.
            config: as of `blockbatch.generate`.
            enable_thinking: of SDAR: see `blockbatch.models.chat.format_chat`.

        Raises:
            CheckpointError: the tokenizer lacks the tokens of the format: a base model, most likely.
            ValueError, TypeError, MemoryError, NonFiniteLogitsError: as of `blockbatch.generate`.
        """
        return _conversation().chat(self, messages, config, enable_thinking=enable_thinking)

    def chat_ids(
        self, messages: str | Sequence[Mapping[str, str]], *, enable_thinking: bool | None = None
    ) -> list[int]:
        """The prompt of `chat`, for `blockbatch.generate` and `blockbatch.stream`."""
        return _conversation().chat_ids(self, messages, enable_thinking=enable_thinking)

    def _mask_size(self, block_size: int | None) -> int | None:
        if block_size is None:
            return self.spec.block_size
        if self.spec.block_size is None:
            raise ValueError(f"block_size: expected None for {self.spec.family}, got {block_size!r}")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size: expected a positive integer, got {block_size!r}")
        return block_size


def _conversation() -> ModuleType:
    # By its name: what decodes stands above the models.
    return import_module("blockbatch.conversation")


def _range(ids: Tensor) -> str:
    return f"ids from {int(ids.min())} to {int(ids.max())}"


def is_block_causal(name_or_path: str | os.PathLike) -> bool:
    """Whether `load_model` would give a model whose attention is causal across blocks.

    Raises:
        CheckpointError, FileNotFoundError: as `load_model`.
    """
    folder = BUILT_IN.get(name_or_path) or resolve_folder(name_or_path)
    return read_spec(read_config(folder)).block_size is not None


def load_model(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    cache_bytes: int | None = None,
    revision: str | None = None,
    mask_token_id: int | None = None,
    adapter: str | os.PathLike | None = None,
    quantization: str | None = None,
    kv_dtype: str | None = None,
    tensor_parallel: int = 1,
    whole_rows: bool = False,
) -> Model:
    """Loads LLaDA, Dream, SDAR, TraDo or Fast-dLLM v2 weights in the HuggingFace layout. No code from the
    repository runs, nothing is unpickled.

    Args:
        name_or_path: "tiny" or "tiny-block" (the models inside this package: full attention, block
            diffusion), a folder, or a hub id ("GSAI-ML/LLaDA-8B-Instruct").
        device: defaults to the current GPU where there is one, else the CPU. Decoding does not need it to
            be the current one.
        dtype: torch dtype or its name; defaults to float32 on the CPU, bfloat16 elsewhere.
        backend: None (the fastest that runs), "reference", "triton" or "cuda".
        cache_bytes: the most memory that the K/V cache may take; None: what the device has free.
        revision: hub revision.
        mask_token_id: SDAR and Fast-dLLM v2: id of MASK, where neither config.json nor a tokenizer says it.
        adapter: folder of a LoRA of PEFT, merged into the weights while they are read
            (`blockbatch.models.lora`).
        quantization: "fp8": the weights of the layers' products become e4m3 with a scale for each row while
            they are read, activations are quantised by token; embedding and LM head stay in `dtype`.
            "fp8-all": the LM head too. None: as the checkpoint has them, which may be stored in e4m3
            (docs/quantization.md).
        kv_dtype: "fp8": the K/V cache holds e4m3, with scales for each layer and kv head from a calibration
            on a few texts; None: it has `dtype` (docs/quantization.md).
        tensor_parallel: processes that hold the model together, each a part on its own GPU: above 1 every one
            of them makes the same calls in the same order; see docs/tensor_parallel.md.
        whole_rows: whether each of these processes holds all weights beside its part, so that rows of an init
            or refresh are dealt out to them whole.

    Raises:
        CheckpointError: the folder lacks something, holds something foreign, or is damaged; or that of the
            adapter, or it does not fit the model.
        MemoryError: the weights do not fit into the GPU's free memory; before any is read.
        ValueError, TypeError, RuntimeError: naming the argument, what was expected and what came.
    """
    device = group.device_of_rank(tensor_parallel, device)
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    check_backend(backend)
    cache_bytes = limit_of(cache_bytes)
    check_quantization(quantization)
    check_kv_dtype(kv_dtype, device, backend)
    merged = None if adapter is None else read_adapter(adapter)
    folder = BUILT_IN.get(name_or_path) or resolve_folder(name_or_path, revision=revision)
    config = read_config(folder)
    spec = read_spec(config)
    if quantization is None:
        quantization = stored_as(folder, spec, config)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    check_whole_rows(whole_rows, tensor_parallel, kv_dtype, spec)
    spec = special_ids.complete(spec, config, folder, str(name_or_path), tokenizer, mask_token_id)
    with devices.current(device):
        share = WHOLE if tensor_parallel == 1 else RankShare(spec, device, dtype)
    what, every, spec = f"the weights of {name_or_path}", spec, share.local_spec(spec)
    options = dict(backend=backend, cache_bytes=cache_bytes, name=str(name_or_path))
    with devices.current(device), share.loading(what), devices.memory_errors(device, what):
        wanted = dict(whole=every if whole_rows else None, vocabulary=share.vocabulary)
        check_room(spec, device, dtype, quantization, str(name_or_path), **wanted)
        stored = dict(quantization=quantization, config=config)
        weights = load_weights(folder, spec, device, dtype, merged, share.shard, **stored)
        model = Model(spec, weights, tokenizer, share=share, **options)
        model.adapter = None if adapter is None else str(adapter)
        if whole_rows:
            weights = load_weights(folder, every, device, dtype, merged, **stored)
            whole = Model(every, weights, tokenizer, **options)
        if device.type == "cuda":  # the first decode may run on another stream
            torch.cuda.current_stream().synchronize()
    if whole_rows:
        with devices.current(device):
            share.hold_whole(whole)
    if kv_dtype is not None:
        model.kv_scales = calibrate(model)
    return model
