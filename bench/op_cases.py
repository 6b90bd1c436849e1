"""Inputs and versions of the floating point operators for `ops.py`, as a block step or a refresh has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import peers
import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models import transformer
from blockbatch.models.spec import ModelSpec

Outputs = tuple[Tensor, ...]
Version = Callable[[int], Outputs]

# Input sets take turns, so that nothing is found in the L2 cache that a step would not find there.
_CACHE_BYTES = 160 * 2**20
_MAX_SETS = 32


@dataclass
class Case:
    """One operator in one shape.

    Attributes:
        op, shape: names for the record.
        bytes, flops: that any version must move and compute at least.
        sets: number of input sets.
        versions: name -> function of the index of an input set; "torch" is the plain one. Outputs include
            what was written in place.
        truth: outputs for set 0 in fp32; None: integers, to be equal to those of "torch".
        reset: brings the inputs of a set back to what they were.
        reset_each: whether repeated calls need that (what it takes is subtracted from the time).
        also_written: what else to compare after a run.
        absent: peers that are not there, with the reason.
    """

    op: str
    shape: str
    bytes: int
    flops: int
    sets: int
    versions: dict[str, Version]
    truth: Callable[[], Outputs] | None
    reset: Callable[[int], None] = lambda index: None
    reset_each: bool = False
    also_written: Callable[[], Outputs] = lambda: ()
    absent: dict[str, str] = field(default_factory=dict)

    def add_peer(self, name: str, make: Callable[[], Version]) -> None:
        """Adds another package's version if that package is there and takes the case."""
        try:
            self.versions[name] = make()
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            self.absent[name] = f"{type(error).__name__}: {error}"[:200]


def backends(op: str, device: torch.device) -> list[str]:
    """The compiled backends of this package that run `op` here; the reference where there is none."""
    found = []
    for name in ("cuda", "triton"):
        try:
            found.append(bbk.backend_of(op, device, name))
        except RuntimeError:
            continue
    return found or ["reference"]


def num_sets(set_bytes: int, device: torch.device) -> int:
    return 2 if device.type == "cpu" else max(2, min(_MAX_SETS, -(-_CACHE_BYTES // set_bytes)))


def norm_case(spec: ModelSpec, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    shape = (tokens, spec.hidden_size)
    size = tokens * spec.hidden_size * dtype.itemsize
    sets = num_sets(4 * size, device)
    x = [torch.randn(shape, device=device).to(dtype) for _ in range(sets)]
    first = [torch.randn(shape, device=device).to(dtype) for _ in range(sets)]
    residual = [value.clone() for value in first]
    weight = torch.rand(spec.hidden_size, device=device).to(dtype) + 0.5
    eps = spec.rms_norm_eps

    def ours(backend: str) -> Version:
        def run(index: int) -> Outputs:
            rest = residual[index]
            return bbk.rms_norm(x[index], weight, eps=eps, residual=rest, backend=backend), rest

        return run

    def plain(index: int) -> Outputs:
        rest = residual[index].add_(x[index])
        return F.rms_norm(rest, (spec.hidden_size,), weight, eps), rest

    def truth() -> Outputs:
        rest = first[0].float() + x[0].float()
        return F.rms_norm(rest, (spec.hidden_size,), weight.float(), eps), rest

    def liger() -> Version:
        norm = peers.liger_add_rms_norm(eps)
        return lambda index: norm(x[index], residual[index], weight)

    case = Case(
        "rms_norm",
        f"{tokens} x {spec.hidden_size}, with residual",
        4 * size,
        0,
        sets,
        {**{name: ours(name) for name in backends("rms_norm", device)}, "torch": plain},
        truth,
        reset=lambda index: residual[index].copy_(first[index]),
    )
    case.add_peer("liger", liger)
    return case


def swiglu_case(spec: ModelSpec, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    size = tokens * spec.intermediate_size * dtype.itemsize
    sets = num_sets(3 * size, device)
    gate_up = [torch.randn(tokens, 2 * spec.intermediate_size, device=device).to(dtype) for _ in range(sets)]

    def ours(backend: str) -> Version:
        return lambda index: (bbk.swiglu(gate_up[index], backend=backend),)

    def plain(index: int) -> Outputs:
        gate, up = gate_up[index].chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    def truth() -> Outputs:
        gate, up = gate_up[0].float().chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    def liger() -> Version:
        activate = peers.liger_swiglu()
        return lambda index: (activate(gate_up[index]),)

    case = Case(
        "swiglu",
        f"{tokens} x 2 x {spec.intermediate_size}",
        3 * size,
        0,
        sets,
        {**{name: ours(name) for name in backends("swiglu", device)}, "torch": plain},
        truth,
    )
    case.add_peer("liger", liger)
    return case


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rope:
    """Where the tokens of a pack stand and go, and the rotation in plain torch."""

    def __init__(self, spec: ModelSpec, tokens: int, device: torch.device) -> None:
        pages = -(-tokens // PAGE_SIZE) + 4
        self.cache_shape = (2, pages, PAGE_SIZE, spec.num_kv_heads, spec.head_dim)
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        slots = torch.randperm(pages * PAGE_SIZE, device=device)[:tokens]
        positions = torch.randint(spec.max_length, (tokens,), dtype=torch.int32, device=device)
        self.inputs = (positions, slots, *transformer.rope_table(spec, device))

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of [tokens, heads, head_dim]."""
        return qkv.split(self.heads, dim=1)

    def plain(self, qkv: Tensor, cache: Tensor) -> Outputs:
        """q, rotated in place, and the cache with k and v written to it."""
        q, k, v = self.parts(qkv)
        positions, slots, cos, sin = self.inputs
        where = positions.long()
        c, s = cos[where].unsqueeze(1), sin[where].unsqueeze(1)
        q.copy_(_rotate(q, c, s))
        cache[0].flatten(0, 1).index_copy_(0, slots, _rotate(k, c, s))
        cache[1].flatten(0, 1).index_copy_(0, slots, v)
        return q, cache


def rope_case(spec: ModelSpec, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    token_bytes = (2 * heads + 4 * kv_heads) * dim * dtype.itemsize
    sets = num_sets(tokens * token_bytes, device)
    rope = _Rope(spec, tokens, device)
    first = [torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype) for _ in range(sets)]
    qkv = [value.clone() for value in first]
    caches = torch.zeros(sets, *rope.cache_shape, dtype=dtype, device=device)

    def ours(backend: str) -> Version:
        def run(index: int) -> Outputs:
            q, k, v = rope.parts(qkv[index])
            bbk.rope_kv_write(q, k, v, *rope.inputs, *caches[index], backend=backend)
            return q, caches[index]

        return run

    def plain(index: int) -> Outputs:
        return rope.plain(qkv[index], caches[index])

    def truth() -> Outputs:
        return rope.plain(first[0].to(torch.float32, copy=True), torch.zeros(rope.cache_shape, device=device))

    def reset(index: int) -> None:
        qkv[index].copy_(first[index])
        caches[index].zero_()

    return Case(
        "rope_kv_write",
        f"{tokens} tokens, {heads} + 2 x {kv_heads} heads of {dim}",
        tokens * (token_bytes + dim * 4),
        0,
        sets,
        {**{name: ours(name) for name in backends("rope_kv_write", device)}, "torch": plain},
        truth,
        reset=reset,
    )


def linear_rope_case(spec: ModelSpec, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    rows, columns = (heads + 2 * kv_heads) * dim, spec.hidden_size
    sets = num_sets(rows * columns * dtype.itemsize, device)
    rope = _Rope(spec, tokens, device)
    x = [torch.randn(tokens, columns, device=device).to(dtype) for _ in range(sets)]
    weight = [torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=0.02) for _ in range(sets)]
    bias = torch.randn(rows, device=device).to(dtype) if spec.qkv_bias else None
    caches = torch.zeros(sets, *rope.cache_shape, dtype=dtype, device=device)

    def ours(backend: str) -> Version:
        # As in the engine: nothing writes the weights once they are there.
        options = dict(num_heads=heads, static_weight=True, backend=backend)

        def run(index: int) -> Outputs:
            cache = caches[index]
            q = bbk.linear_rope_kv_write(x[index], weight[index], bias, *rope.inputs, *cache, **options)
            return q, cache

        return run

    def plain(index: int) -> Outputs:
        return rope.plain(F.linear(x[index], weight[index], bias).unflatten(1, (-1, dim)), caches[index])

    def truth() -> Outputs:
        qkv = F.linear(x[0].float(), weight[0].float(), None if bias is None else bias.float())
        return rope.plain(qkv.unflatten(1, (-1, dim)), torch.zeros(rope.cache_shape, device=device))

    # Beside the weights: x is read, q and what goes into the caches written.
    moved = rows * columns + tokens * (columns + rows)
    return Case(
        "linear_rope_kv_write",
        f"{tokens} x {columns}, {heads} + 2 x {kv_heads} heads of {dim}",
        moved * dtype.itemsize + tokens * dim * 4,
        2 * tokens * columns * rows,
        sets,
        {**{name: ours(name) for name in backends("linear_rope_kv_write", device)}, "torch": plain},
        truth,
        reset=lambda index: caches[index].zero_(),
    )


def attention_case(
    spec: ModelSpec,
    queries: tuple[int, ...],
    length: int,
    shared: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    """Rows of `queries` tokens over `length` keys each, on pages of their own or all on the same."""
    heads, kv_heads, dim, rows = spec.num_heads, spec.num_kv_heads, spec.head_dim, len(queries)
    tokens, columns = sum(queries), -(-length // PAGE_SIZE)
    pages = columns if shared else rows * columns
    set_bytes = 2 * pages * PAGE_SIZE * kv_heads * dim * dtype.itemsize
    sets = num_sets(set_bytes, device)
    q = [torch.randn(tokens, heads, dim, device=device).to(dtype) for _ in range(sets)]
    caches = torch.randn(sets, 2, pages, PAGE_SIZE, kv_heads, dim, device=device, dtype=dtype)
    order = torch.randperm(pages, device=device).int().view(-1, columns)
    table = order.expand(rows, columns).contiguous()
    bounds = torch.tensor([0, *queries]).cumsum(0).int().to(device)
    seqlens = torch.full((rows,), length, dtype=torch.int32, device=device)

    def ours(backend: str) -> Version:
        plan = None
        if backend != "reference":
            plan = bbk.attention_plan(
                table,
                bounds,
                seqlens,
                page_size=PAGE_SIZE,
                num_tokens=tokens,
                num_heads=heads,
                num_kv_heads=kv_heads,
                distinct_rows=1 if shared else rows,
                backend=backend,
            )

        def run(index: int) -> Outputs:
            k, v = caches[index]
            return (bbk.varlen_attention(q[index], k, v, table, bounds, seqlens, plan=plan, backend=backend),)

        return run

    def gathered(cache: Tensor) -> Tensor:
        return torch.cat([cache[row.long()].flatten(0, 1)[:length] for row in table])

    def attend(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, first = [], 0
        for row, count in enumerate(queries):
            keys, values = (
                cache[table[row].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k, v)
            )
            part = query[first : first + count].transpose(0, 1)[None]
            out.append(F.scaled_dot_product_attention(part, keys, values, enable_gqa=heads != kv_heads)[0])
            first += count
        return torch.cat(out, dim=1).transpose(0, 1)

    lengths = [length] * rows
    case = Case(
        "varlen_attention",
        f"{'+'.join(map(str, queries))} queries, {length} keys, {heads}/{kv_heads} heads of {dim}, "
        f"{'shared' if shared else 'separate'} pages",
        set_bytes + 2 * tokens * heads * dim * dtype.itemsize,
        4 * tokens * length * heads * dim,
        sets,
        {
            **{name: ours(name) for name in backends("varlen_attention", device)},
            "torch": lambda index: (attend(q[index], *caches[index]),),
        },
        lambda: (attend(q[0].float(), *caches[0].float()),),
    )
    if device.type == "cuda":

        def version(attention: peers.Attention) -> Version:
            return lambda index: (attention(q[index], *caches[index]),)

        def fa2() -> Version:
            return version(peers.flash_attention_2(gathered, bounds, lengths))

        def fa3() -> Version:
            return version(peers.flash_attention_3(table, bounds, lengths))

        def flashinfer() -> Version:
            return version(peers.flashinfer_attention(table, bounds, lengths, heads, caches[0, 0]))

        case.add_peer("flash-attention 2, keys gathered beforehand", fa2)
        case.add_peer("flash-attention 3", fa3)
        case.add_peer("flashinfer", flashinfer)
    return case


def lm_head_case(spec: ModelSpec, predictions: int, device: torch.device, dtype: torch.dtype) -> Case:
    weight = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device).normal_(std=0.02)
    hidden = [torch.randn(predictions, spec.hidden_size, device=device).to(dtype) for _ in range(2)]

    def ours(backend: str) -> Version:
        return lambda index: bbk.lm_head_confidence(hidden[index], weight, backend=backend)[:2]

    def plain(index: int) -> Outputs:
        confidence, top_token = F.linear(hidden[index], weight).float().softmax(-1).max(-1)
        return top_token.int(), confidence

    def truth() -> Outputs:
        confidence, top_token = F.linear(hidden[0].float(), weight.float()).softmax(-1).max(-1)
        return top_token.int(), confidence

    return Case(
        "lm_head_confidence",
        f"{predictions} x {spec.hidden_size} x {spec.vocab_size}",
        weight.nbytes + hidden[0].nbytes,
        2 * predictions * spec.hidden_size * spec.vocab_size,
        2,
        {**{name: ours(name) for name in backends("lm_head_confidence", device)}, "torch": plain},
        truth,
    )
