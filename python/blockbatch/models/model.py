"""A loaded model: weights, tokenizer and the two forwards that everything else uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.kv_cache import KVCache
from blockbatch.models import likelihood, transformer
from blockbatch.models.checkpoint import load_weights, read_config, read_spec, resolve_folder
from blockbatch.models.likelihood import LogLikelihood
from blockbatch.models.spec import ModelSpec
from blockbatch.models.tokenizer import Tokenizer, has_tokenizer
from blockbatch.models.weights import TransformerWeights

TINY_FOLDER = Path(__file__).resolve().parent.parent / "tiny" / "checkpoint"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model:
    """A masked diffusion language model on one device. `load_model` makes one.

    Attributes:
        spec: the architecture.
        tokenizer: None for a folder without one; prompts are then token ids.
        eos_token_ids: ids that end a text, unless a config names others.
        device, dtype: of the weights and activations.
        cache_bytes: the most memory that the K/V cache of a batch may take; None: what the device has free.
        runners: on a GPU the buffers and captured steps of earlier decodes; None before the first.
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
    ) -> None:
        self.spec, self.weights, self.tokenizer, self.backend = spec, weights, tokenizer, backend
        self.cache_bytes, self.name = cache_bytes, name
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.eos_token_ids = tokenizer.eos_token_ids(spec) if tokenizer else spec.eos_token_ids
        self.runners = None
        self._rope = transformer.rope_table(spec, self.device)

    def new_cache(self, num_requests: int, num_branches: int, canvas_length: int) -> KVCache:
        return KVCache(
            num_requests,
            num_branches,
            canvas_length,
            num_layers=self.spec.num_layers,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
        )

    def predict(
        self, packed: bbk.PackedQueries, cache: KVCache, seqlens_k: Tensor, probe_tokens: Tensor | None = None
    ) -> bbk.Predictions:
        """One forward of the packed queries.

        Args:
            packed: the queries, in the cache's slots.
            cache: *written* at the queries' slots.
            seqlens_k: [rows] int32, canvas lengths.
            probe_tokens: [predictions] int32, tokens whose probability is wanted too.
        """
        # Whole rows predict at few of their tokens, and no key or value comes behind the last attention. Of a
        # window nearly all tokens predict.
        few = 2 * packed.predict_index.shape[0] <= packed.input_ids.shape[0]
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
            backend=self.backend,
        )
        top_token, confidence, probe_probability = bbk.lm_head_confidence(
            hidden if few else hidden[packed.predict_index],
            self.weights.lm_head,
            probe_tokens=probe_tokens,
            suppress_token=self.spec.mask_token_id if self.spec.suppress_mask else None,
            backend=self.backend,
        )
        return bbk.Predictions(packed.predict_target, top_token, confidence, probe_probability)

    def logits(self, input_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """One full forward without a cache.

        Args:
            input_ids: [rows, length] integers (one row may be given flat).

        Returns:
            [rows, length, vocab_size] in the model's dtype, as the model gives them: Dream's logits at a
            position predict the next one.
        """
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

        return F.linear(self.hidden_states(ids), self.weights.lm_head).view(rows, length, -1)

    def hidden_states(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """One full forward without a cache, up to the final norm.

        Args:
            ids: [rows, length] integers of the vocabulary, at most `spec.max_length` positions.
            wanted: [n] int64, places in the flattened ids; None: all of them.

        Returns:
            [n, hidden_size]: those of the wanted places.
        """
        rows, length = ids.shape
        # One page a row; the layers take turns on the same memory, since none looks back.
        heads = (self.spec.num_kv_heads, self.spec.head_dim)
        kv = torch.zeros(1, 2, rows, length, *heads, dtype=self.dtype, device=self.device)
        index = torch.arange(rows * length, device=self.device)
        packed = bbk.PackedQueries(
            input_ids=ids.flatten().int(),
            positions=(index % length).int(),
            row_index=(index // length).int(),
            cu_seqlens_q=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=self.device),
            slot_mapping=index,
            predict_index=index,
            predict_target=index,
        )
        return transformer.forward(
            self.spec,
            self.weights,
            self._rope,
            packed,
            kv.expand(self.spec.num_layers, -1, -1, -1, -1, -1),
            torch.arange(rows, dtype=torch.int32, device=self.device).unsqueeze(1),
            torch.full((rows,), length, dtype=torch.int32, device=self.device),
            wanted=wanted,
            backend=self.backend,
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


def _range(ids: Tensor) -> str:
    return f"ids from {int(ids.min())} to {int(ids.max())}"


def load_model(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    cache_bytes: int | None = None,
    revision: str | None = None,
) -> Model:
    """Loads LLaDA or Dream weights in the HuggingFace layout. No code from the repository runs, nothing is
    unpickled.

    Args:
        name_or_path: "tiny" (the model inside this package), a folder, or a hub id
            ("GSAI-ML/LLaDA-8B-Instruct").
        device: defaults to the current GPU where there is one, else the CPU.
        dtype: torch dtype or its name; defaults to float32 on the CPU, bfloat16 elsewhere.
        backend: None (the fastest that runs), "reference", "triton" or "cuda".
        cache_bytes: the most memory that the K/V cache may take; None: what the device has free.
        revision: hub revision.

    Raises:
        CheckpointError: the folder lacks something, holds something foreign, or is damaged.
        ValueError, TypeError, RuntimeError: naming the argument, what was expected and what came.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {str(device)!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: expected a usable GPU for 'cuda', got none (torch sees no CUDA device)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        dtype = _DTYPES[dtype]
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}")
    if backend not in (None, "reference", "triton", "cuda"):
        raise ValueError(f"backend: expected None, 'reference', 'triton' or 'cuda', got {backend!r}")
    if cache_bytes is not None and (not isinstance(cache_bytes, int) or cache_bytes <= 0):
        raise ValueError(f"cache_bytes: expected a positive number of bytes, got {cache_bytes!r}")

    folder = TINY_FOLDER if name_or_path == "tiny" else resolve_folder(name_or_path, revision=revision)
    spec = read_spec(read_config(folder))
    weights = load_weights(folder, spec, device, dtype)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer(folder) else None
    return Model(spec, weights, tokenizer, backend=backend, cache_bytes=cache_bytes, name=str(name_or_path))
