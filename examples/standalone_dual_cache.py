"""A complete dual-cache decoder (Fast-dLLM, arXiv 2505.22618) on the operators of `blockbatch_kernels` alone.

Meant to be read by people who write a decoder of their own: a LLaDA transformer whose weights come straight
from safetensors, one paged K/V cache, and the loop of forwards. Each block gets one full forward over the
canvas and then forwards over the block alone, until the block holds no MASK; all other K and V stay as the
full forward left them. Pages come from a `bbk.PagePool`, so they may be those of any allocator.

    python examples/standalone_dual_cache.py FOLDER --prompt 5 17 42 --gen-length 64
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import blockbatch_kernels as bbk

PAGE_SIZE = 16


class Layer(NamedTuple):
    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    attention_out: Tensor  # [hidden, num_heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


class Transformer:
    """LLaDA: pre-norm layers, RMSNorm, rotary embedding, non-causal attention, SwiGLU, no biases.

    Args:
        folder: `config.json` and `model.safetensors` in LLaDA's layout.
        device, dtype: of the weights and the arithmetic.
        backend: who runs the operators; None: the fastest that can.
    """

    def __init__(
        self, folder: Path, device: str, dtype: torch.dtype = torch.float32, backend: str | None = None
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")

        def weight(*names: str) -> Tensor:
            parts = [stored[f"model.transformer.{name}.weight"] for name in names]
            return torch.cat(parts).to(device, dtype)

        self.layers = [
            Layer(
                attention_norm=weight(f"blocks.{i}.attn_norm"),
                qkv=weight(f"blocks.{i}.q_proj", f"blocks.{i}.k_proj", f"blocks.{i}.v_proj"),
                attention_out=weight(f"blocks.{i}.attn_out"),
                mlp_norm=weight(f"blocks.{i}.ff_norm"),
                gate_up=weight(f"blocks.{i}.ff_proj", f"blocks.{i}.up_proj"),
                down=weight(f"blocks.{i}.ff_out"),
            )
            for i in range(config["n_layers"])
        ]
        self.embedding, self.final_norm, self.lm_head = weight("wte"), weight("ln_f"), weight("ff_out")
        self.num_heads, self.num_kv_heads = config["n_heads"], config["n_kv_heads"]
        self.head_dim = config["d_model"] // self.num_heads
        self.eps, self.backend = config["rms_norm_eps"], backend
        self.mask_token_id, self.eos_token_id = config["mask_token_id"], config["eos_token_id"]
        exponent = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim
        positions = torch.arange(config["max_sequence_length"], device=device)
        angle = torch.outer(positions.float(), config["rope_theta"] ** -exponent)
        self.rope = angle.cos(), angle.sin()  # [max positions, head_dim / 2] fp32

    def new_cache(self, num_pages: int) -> Tensor:
        """[layers, 2, pages, page_size, num_kv_heads, head_dim]"""
        shape = (len(self.layers), 2, num_pages, PAGE_SIZE, self.num_kv_heads, self.head_dim)
        return self.embedding.new_zeros(shape)

    def forward(self, packed: bbk.PackedQueries, kv_cache: Tensor, page_table: Tensor, seqlens_k: Tensor):
        """Runs the packed queries through all layers; writes their K and V to the cache.

        Returns:
            [queries, hidden], after the final norm.
        """
        widths = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        rows, backend = (page_table, packed.cu_seqlens_q, seqlens_k), self.backend
        # How the attention is cut into work depends on lengths and pages alone: once for all layers.
        work = bbk.attention_plan(
            *rows,
            page_size=PAGE_SIZE,
            num_tokens=len(packed.input_ids),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            backend=backend,
        )
        residual = F.embedding(packed.input_ids, self.embedding)
        added = torch.zeros_like(residual)
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache):
            normed = self._norm(added, layer.attention_norm, residual)
            q, k, v = (
                part.unflatten(1, (-1, self.head_dim))
                for part in F.linear(normed, layer.qkv).split(widths, 1)
            )
            bbk.rope_kv_write(
                q, k, v, packed.positions, packed.slot_mapping, *self.rope, k_cache, v_cache, backend=backend
            )
            attended = bbk.varlen_attention(q, k_cache, v_cache, *rows, plan=work, backend=backend)
            added = F.linear(attended.flatten(1), layer.attention_out)
            gate_up = F.linear(self._norm(added, layer.mlp_norm, residual), layer.gate_up)
            added = F.linear(bbk.swiglu(gate_up, backend=backend), layer.down)
        return self._norm(added, self.final_norm, residual)

    def _norm(self, added: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """Adds to the residual stream in place, and norms the sum."""
        return bbk.rms_norm(added, weight, eps=self.eps, residual=residual, backend=self.backend)


@torch.inference_mode()
def decode(
    model: Transformer,
    prompt: list[int],
    gen_length: int,
    *,
    block_size: int = 32,
    threshold: float | None = 0.9,
    steps: int | None = None,
    page_ids: Sequence[int] | None = None,
) -> tuple[list[int], int]:
    """Fills `gen_length` positions behind the prompt.

    Args:
        threshold: commit every token of at least this confidence, and always the surest one; None: a fixed
            number of tokens a step, so that the whole takes `steps` forwards.
        page_ids: pages that an allocator of your own has free; None: those of a cache of just this size.

    Returns:
        the generated token ids, and the number of forwards.
    """
    backend = model.backend

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=model.embedding.device)

    params = bbk.PolicyParams(
        mask_token_id=model.mask_token_id,
        eos_token_ids=(model.eos_token_id,),
        threshold=threshold,
        steps_per_block=None if threshold is not None else steps * block_size // gen_length,
        refresh_interval=block_size,  # a full forward whenever a block is done
        eos_exit="none",
    )
    length = len(prompt) + gen_length
    num_pages = -(-length // PAGE_SIZE)
    page_ids = range(num_pages) if page_ids is None else page_ids
    kv_cache, page_table = model.new_cache(1 + max(page_ids)), ints([-1] * num_pages).unsqueeze(0)
    # The row has no page yet: what it is about to write, here all of its canvas, gets pages of the pool.
    pool = bbk.PagePool.of(ints(list(page_ids)))
    bbk.copy_pages(
        kv_cache, page_table, ints([0]), ints([length]), num_branches=1, pool=pool, backend=backend
    )
    pool.check()
    seqlens_k = ints([length])
    state = bbk.BranchState.create(
        ints(prompt).unsqueeze(0), ints([len(prompt)]), ints([block_size]), gen_length, model.mask_token_id
    )
    plan = bbk.initial_plan(state, params, backend=backend)
    while True:
        running, _, num_queries, num_predictions, _ = plan.flags.tolist()  # the one wait for the device
        if not running:
            return state.tokens[0].tolist(), int(state.nfe.sum())
        packed = bbk.pack_windows(
            state,
            plan,
            page_table,
            page_size=PAGE_SIZE,
            capacity=num_queries,
            predict_capacity=num_predictions,
            backend=backend,
        )
        hidden = model.forward(packed, kv_cache, page_table, seqlens_k)
        top_token, confidence, _ = bbk.lm_head_confidence(
            hidden[packed.predict_index], model.lm_head, backend=backend
        )
        predictions = bbk.Predictions(packed.predict_target, top_token, confidence)
        plan, _ = bbk.decode_policy(state, predictions, plan, params, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="config.json and model.safetensors in LLaDA's layout")
    parser.add_argument("--prompt", type=int, nargs="+", required=True, help="token ids")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokens, nfe = decode(Transformer(args.folder, args.device), args.prompt, args.gen_length)
    print(f"{nfe} forwards:", *tokens)


if __name__ == "__main__":
    main()
