"""The weights of one transformer as the operators want them: query/key/value and gate/up fused by rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockbatch import devices
from blockbatch.models.quantized_weights import QUANTIZATIONS, QuantizedWeight
from blockbatch.models.spec import ModelSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class LayerWeights:
    """One layer: Hq and Hkv heads of D, hidden size d, intermediate size I. Products are x @ weight.T.

    The four weights of products are quantised or tensors, all alike.
    """

    input_norm: torch.Tensor  # [d]
    qkv_weight: torch.Tensor | QuantizedWeight  # [(Hq + 2 Hkv) D, d]: query rows, then key, then value
    qkv_bias: torch.Tensor | None  # [(Hq + 2 Hkv) D]
    out_weight: torch.Tensor | QuantizedWeight  # [d, Hq D]
    post_norm: torch.Tensor  # [d]
    gate_up_weight: torch.Tensor | QuantizedWeight  # [2 I, d]: gate rows first
    down_weight: torch.Tensor | QuantizedWeight  # [d, I]
    q_norm: torch.Tensor | None = None  # [D], of every head of q
    k_norm: torch.Tensor | None = None  # [D]


@dataclass
class TransformerWeights:
    """All weights, on one device and, but for quantised ones, in one dtype."""

    embedding: torch.Tensor  # [embedding_size, d]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [d]
    # [vocab_size, d]; tied and not quantised: a view of rows of `embedding`
    lm_head: torch.Tensor | QuantizedWeight


@dataclass(frozen=True)
class Destination:
    """Where one tensor of a checkpoint belongs.

    Attributes:
        layer: index of the layer, or None for a tensor of the whole model.
        field: attribute of `LayerWeights` or `TransformerWeights`.
        start, stop: the rows of that attribute which the tensor fills.
        shape: the tensor's shape in the checkpoint; what lies beyond the rows and columns of the attribute is
            not read: padding, or the part of another rank.
        first_row, first_column: of the tensor, where the part that is read begins.
    """

    layer: int | None
    field: str
    start: int
    stop: int
    shape: tuple[int, ...]
    first_row: int = 0
    first_column: int = 0

    def rows(self, weights: TransformerWeights) -> torch.Tensor | QuantizedWeight:
        """The view of `weights` to be filled; contiguous."""
        owner = weights if self.layer is None else weights.layers[self.layer]
        return getattr(owner, self.field)[self.start : self.stop]


def layer_destinations(spec: ModelSpec, layer: int) -> dict[str, Destination]:
    """Destination of each tensor of layer `layer`, by role.

    Roles: input_norm, q, k, v, q_bias, k_bias, v_bias (biases only where `spec.qkv_bias`), q_norm, k_norm
    (only where `spec.qk_norm`), out, post_norm, gate, up, down. A family gives the names in its checkpoints
    to these roles.
    """
    d, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_rows = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}

    def place(field: str, start: int, stop: int, *columns: int) -> Destination:
        return Destination(layer, field, start, stop, (stop - start, *columns))

    roles = {role: place("qkv_weight", start, stop, d) for role, (start, stop) in qkv_rows.items()}
    if spec.qkv_bias:
        roles |= {f"{role}_bias": place("qkv_bias", start, stop) for role, (start, stop) in qkv_rows.items()}
    if spec.qk_norm:
        roles |= {role: place(role, 0, spec.head_dim) for role in ("q_norm", "k_norm")}
    return roles | {
        "input_norm": place("input_norm", 0, d),
        "out": place("out_weight", 0, d, q),
        "post_norm": place("post_norm", 0, d),
        "gate": place("gate_up_weight", 0, inner, d),
        "up": place("gate_up_weight", inner, 2 * inner, d),
        "down": place("down_weight", 0, d, inner),
    }


def model_destinations(spec: ModelSpec) -> dict[str, Destination]:
    """Destinations outside the layers, by role: embedding, final_norm, lm_head (unless tied)."""
    table = (spec.embedding_size, spec.hidden_size)
    roles = {
        "embedding": Destination(None, "embedding", 0, spec.embedding_size, table),
        "final_norm": Destination(None, "final_norm", 0, spec.hidden_size, (spec.hidden_size,)),
    }
    if not spec.tie_embeddings:
        roles["lm_head"] = Destination(None, "lm_head", 0, spec.vocab_size, table)
    return roles


def allocate(
    spec: ModelSpec,
    device: torch.device | str,
    dtype: torch.dtype,
    vocabulary: range | None = None,
    quantization: str | None = None,
) -> TransformerWeights:
    """Uninitialised weights for `spec`.

    Args:
        vocabulary: token ids of the LM head; None: all of them.
        quantization: None, or "fp8": the weights of the layers' products are in e4m3; "fp8-all": the LM head
            too, which then is no part of an embedding that it is tied to.

    Raises:
        ValueError: `dtype` is not float32, bfloat16 or float16, or the quantisation is not known.
    """
    check_quantization(quantization)
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype must be one of {names}, got {dtype}")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def weight(rows: int, columns: int) -> torch.Tensor | QuantizedWeight:
        return empty(rows, columns) if quantization is None else QuantizedWeight.empty(rows, columns, device)

    d, inner, q = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    qkv = q + 2 * spec.num_kv_heads * spec.head_dim
    layers = [
        LayerWeights(
            input_norm=empty(d),
            qkv_weight=weight(qkv, d),
            qkv_bias=empty(qkv) if spec.qkv_bias else None,
            out_weight=weight(d, q),
            post_norm=empty(d),
            gate_up_weight=weight(2 * inner, d),
            down_weight=weight(d, inner),
            q_norm=empty(spec.head_dim) if spec.qk_norm else None,
            k_norm=empty(spec.head_dim) if spec.qk_norm else None,
        )
        for _ in range(spec.num_layers)
    ]
    embedding = empty(spec.embedding_size, d)
    tokens = range(spec.vocab_size) if vocabulary is None else vocabulary
    if quantization == "fp8-all":
        lm_head = QuantizedWeight.empty(len(tokens), d, device)
    else:
        lm_head = embedding[tokens.start : tokens.stop] if spec.tie_embeddings else empty(len(tokens), d)
    return TransformerWeights(embedding=embedding, layers=layers, final_norm=empty(d), lm_head=lm_head)


def quantization_of(weights: TransformerWeights) -> str | None:
    """The quantisation of weights that `allocate` made; None: of none."""
    if not isinstance(weights.layers[0].qkv_weight, QuantizedWeight):
        return None
    return "fp8-all" if isinstance(weights.lm_head, QuantizedWeight) else "fp8"


def check_quantization(quantization: str | None) -> None:
    if quantization is not None and quantization not in tuple(QUANTIZATIONS):
        names = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization: expected None or one of {names}, got {quantization!r}")


def weight_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    vocabulary: range | None = None,
    quantization: str | None = None,
) -> int:
    """Bytes of the weights that `allocate` makes."""
    weights = allocate(spec, "meta", dtype, vocabulary, quantization)
    tensors = [
        weights.embedding,
        weights.final_norm,
        *(tensor for layer in weights.layers for tensor in vars(layer).values() if tensor is not None),
    ]
    if not spec.tie_embeddings or quantization == "fp8-all":
        tensors.append(weights.lm_head)
    return sum(tensor.nbytes for tensor in tensors)


def check_room(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    name: str,
    vocabulary: range | None = None,
    whole: ModelSpec | None = None,
) -> None:
    """Raises MemoryError if the weights, and those of `whole`, do not fit into what a GPU has free."""
    if device.type != "cuda":
        return  # a system may well swap
    needed, free = weight_bytes(spec, dtype, vocabulary, quantization), devices.free_bytes(device)
    if whole is not None:
        needed += weight_bytes(whole, dtype, None, quantization)
    if needed > free:
        raise MemoryError(
            f"free memory of {device}: expected at least {needed:,} bytes for the weights of {name} in "
            f"{quantization or str(dtype).removeprefix('torch.')}, got {free:,}"
        )
