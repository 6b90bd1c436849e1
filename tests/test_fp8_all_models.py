"""Models whose LM head is in e4m3 too: quantised while they are loaded, or stored so."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import blockbatch
import blockbatch_kernels as bbk
import plain_models
import rank_cases
import rank_processes
from block_models import write as write_block
from blockbatch import memory
from blockbatch.decoding import METHOD_BUILDERS, Session
from blockbatch.methods import BLOCK_METHODS
from blockbatch.models import checkpoint, transformer, weights
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.spec import CheckpointError
from blockbatch.parallel.shards import Shard
from blockbatch.tracing import trace_header
from blockbatch_kernels import library
from live_memory import LiveMemory
from lora_files import merge_by_hand, targets_of, write_adapter, write_model
from test_fp8_models import FIELDS, FORMATS, WRITERS, by_row, load, quantise, write_stored

PROMPT = [1, 5, 3, 2, 7]
HEADS = {"llada": "model.transformer.ff_out.weight"}  # by family; of all others:
HEAD = "lm_head.weight"
TIED = {
    "llada": lambda folder: plain_models.write_llada(folder, weight_tying=True),
    "dream": lambda folder: plain_models.write_dream(folder, tie_word_embeddings=True),
    "sdar": lambda folder: write_block(folder, "sdar", tie_word_embeddings=True),
}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    WRITERS[request.param](tmp_path)
    return tmp_path


def load_all(folder, **options):
    return load(folder, quantization="fp8-all", **options)


def head_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return HEADS.get(config["model_type"], HEAD)


def same(one, other):
    return torch.equal(one.values.float(), other.values.float()) and torch.equal(one.scale, other.scale)


def test_the_head_is_quantised_by_row(folder):
    plain, layers, model = load(folder), load(folder, quantization="fp8"), load_all(folder)
    assert (layers.quantization, model.quantization) == ("fp8", "fp8-all")
    assert model.numbers == "float32, layers and LM head in fp8"
    head = model.weights.lm_head
    assert isinstance(head, QuantizedWeight) and head.shape == plain.weights.lm_head.shape
    values, scale = by_row(plain.weights.lm_head)
    used = plain.weights.lm_head.abs().amax(-1) > 0  # the rest are zeros
    assert used.any()
    torch.testing.assert_close(head.scale[used], scale[used])
    torch.testing.assert_close(head.values.float()[used], values[used], rtol=2**-3, atol=2**-9)
    assert (head.values.float()[used] == values[used]).float().mean() > 0.99
    assert not head.values.float()[~used].any()
    assert torch.equal(model.weights.embedding, plain.weights.embedding)
    for ours, theirs in zip(model.weights.layers, layers.weights.layers, strict=True):
        assert all(same(getattr(ours, field), getattr(theirs, field)) for field in FIELDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_is_a_copy_of_its_own(family, dtype, tmp_path):
    """The same as one that is stored beside an embedding of the same numbers."""
    TIED[family](tmp_path)
    plain, model = load(tmp_path, dtype=dtype), load_all(tmp_path, dtype=dtype)
    assert model.spec.tie_embeddings and torch.equal(model.weights.embedding, plain.weights.embedding)
    ids = [PROMPT * 4]
    logits = model.logits(ids)
    tensors = plain_models.read_weights(tmp_path)
    places = checkpoint.TENSOR_MAPS[family](model.spec)
    table = next(name for name, place in places.items() if place.field == "embedding")
    tensors[head_of(tmp_path)] = tensors[table].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    stored_beside = load_all(tmp_path, dtype=dtype)
    assert same(stored_beside.weights.lm_head, model.weights.lm_head)
    config = json.loads((tmp_path / "config.json").read_text())
    for option in ("weight_tying", "tie_word_embeddings"):
        if option in config:
            config[option] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    untied = load_all(tmp_path, dtype=dtype)
    assert not untied.spec.tie_embeddings and same(untied.weights.lm_head, model.weights.lm_head)
    assert torch.equal(untied.logits(ids), logits)


def test_logits_are_those_of_rows_in_e4m3(folder):
    """A second witness: rows of hidden states and of the head rounded to e4m3, products in fp32."""
    model, layers = load_all(folder), load(folder, quantization="fp8")
    ids = torch.tensor([PROMPT * 4, PROMPT[::-1] * 4])
    hidden = layers.hidden_states(ids, block_size=layers.spec.block_size)
    (values, scale), (w_values, w_scale) = by_row(hidden), by_row(layers.weights.lm_head.float())
    want = (values @ w_values.nan_to_num().T) * scale[:, None] * w_scale
    got, exact = model.logits(ids).flatten(0, 1), layers.logits(ids).flatten(0, 1)
    effect = (want - exact).abs().mean()
    assert 0 < effect < 0.05 * exact.abs().mean() and (got - want).abs().mean() < 0.1 * effect


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0.7, seed=3),
        dict(temperature=0.7, seed=3, top_p=0.9, top_k=20),
        dict(eos_exit="window"),  # asks the LM head for a token
    ],
    ids=["greedy", "drawn", "filtered", "probes"],
)
def test_a_decode_by_each_family(folder, options):
    model = load_all(folder, dtype="bfloat16")
    method = "blockbatch"
    if model.spec.block_size is not None:
        method = BLOCK_METHODS[0]
        options = {name: value for name, value in options.items() if name != "eos_exit"}
    result = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(method, gen_length=16, **options))
    assert result.nfe.total > 0 and model.spec.mask_token_id not in result.canvas


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_a_decode_by_each_method(family, method, tmp_path):
    WRITERS[family](tmp_path)
    model = load_all(tmp_path)
    result = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(method, gen_length=16))
    assert result.nfe.total > 0 and model.spec.mask_token_id not in result.canvas


def test_the_whole_model_is_never_there_in_16_bits(tmp_path):
    plain_models.write_llada(
        tmp_path, d_model=128, mlp_hidden_size=256, vocab_size=8000, embedding_size=8000, dtype=torch.bfloat16
    )
    with LiveMemory() as live:
        model = load_all(tmp_path, dtype="bfloat16")
    head = model.weights.lm_head
    assert head.shape == (8000, 128)
    quantised = weights.weight_bytes(model.spec, torch.bfloat16, quantization="fp8-all")
    layers = weights.weight_bytes(model.spec, torch.bfloat16, quantization="fp8")
    assert quantised == layers - 8000 * (128 - 4)
    # What is read of a file at a time here is all of the head, and what quantising makes of it in fp32.
    assert live.peak <= quantised + 24 * 8000 * 128


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["dream", "tied"])
def test_weights_are_counted(family, dtype, tmp_path):
    (WRITERS | {"tied": TIED["llada"]})[family](tmp_path)
    model = load_all(tmp_path, dtype=dtype)
    tensors = []
    for owner in (model.weights, *model.weights.layers):
        for value in vars(owner).values():
            parts = vars(value).values() if isinstance(value, QuantizedWeight) else [value]
            tensors += [part for part in parts if isinstance(part, torch.Tensor)]
    memories = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert weights.weight_bytes(model.spec, model.dtype, quantization="fp8-all") == sum(memories.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [200, 5000])
def test_what_a_forward_takes_is_bounded(tmp_path, dtype, vocabulary, monkeypatch):
    monkeypatch.setitem(blockbatch.decoding.session.ROW_TOKENS, "cpu", 64)
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)
    plain_models.write_llada(tmp_path, d_model=64, mlp_hidden_size=64, vocab_size=vocabulary)
    model = load_all(tmp_path, dtype=dtype)
    config = blockbatch.DecodeConfig(gen_length=16)
    prompts = [[1 + number % 5] * 40 for number in range(30)]
    built = METHOD_BUILDERS["blockbatch"](config, model.spec, model.eos_token_ids)
    needed = memory.needs(model, config, len(prompts), 40)
    with LiveMemory() as live:
        session = Session(model, prompts, built, config.gen_length)
        for _ in range(3):
            session.step()
    assert needed.cache < live.peak <= sum(needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["lm_head_confidence_fp8", "lm_head_likely_fp8"])
@pytest.mark.parametrize("predictions", [2, 300])
def test_what_the_head_takes_is_bounded(tmp_path, predictions, operator, dtype, monkeypatch):
    """Of few predictions a part of the weight in fp32 is the most."""
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)
    plain_models.write_llada(
        tmp_path, d_model=256, n_heads=1, n_kv_heads=1, mlp_hidden_size=16, vocab_size=3000
    )
    model = load_all(tmp_path)
    spec = dataclasses.replace(model.spec, head_dim=16)
    hidden, head = torch.randn(predictions, 256).to(dtype), model.weights.lm_head
    with LiveMemory() as live:
        getattr(bbk, operator)(hidden, head.values, head.scale)
    allowed = transformer.activation_bytes(spec, dtype, predictions, quantization="fp8-all")
    assert 4 * 3000 * 256 < live.peak <= allowed


def test_the_trace_says_it(tmp_path):
    plain_models.write_llada(tmp_path)
    config, model = blockbatch.DecodeConfig(gen_length=16, trace=True), load_all(tmp_path)
    result = blockbatch.generate(model, PROMPT, config)
    assert trace_header(model, PROMPT, config, result)["quantization"] == "fp8-all"


def test_a_likelihood(tmp_path):
    WRITERS["dream"](tmp_path)
    plain, model = load(tmp_path), load_all(tmp_path)
    want, got = (one.log_likelihood(PROMPT, [4, 9, 2], samples=8).value for one in (plain, model))
    assert got != want and abs(got - want) < 0.2 * abs(want)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_adapter_is_added_first(tmp_path, family):
    base = write_model(tmp_path / "base", family)
    targets = (*targets_of(family), head_of(base).removesuffix(".weight"))
    tensors = write_adapter(tmp_path / "adapter", base, targets)
    assert any(head_of(base).removesuffix("weight") in name for name in tensors)
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 2)
    merged, by_hand = load_all(base, adapter=tmp_path / "adapter"), load_all(tmp_path / "merged")
    torch.testing.assert_close(merged.weights.lm_head.scale, by_hand.weights.lm_head.scale)
    torch.testing.assert_close(
        merged.weights.lm_head.float(), by_hand.weights.lm_head.float(), rtol=2**-3, atol=1e-4
    )
    assert not same(merged.weights.lm_head, load_all(base).weights.lm_head)


# Stored in e4m3.


def write_stored_head(folder, kind):
    """Rewrites a folder's products and its head in e4m3; returns what the head stands for."""
    exact, name = {}, head_of(folder)

    def change(tensors):
        values, scale, exact[name] = quantise(tensors[name].float(), kind)
        tensors[name] = torch.where(values.isnan(), 0.0, values.float()).to(values.dtype)
        exact[name].nan_to_num_()
        tensors[name.removesuffix("weight") + FORMATS[kind][1]] = scale

    write_stored(folder, kind, change=change)
    return exact[name]


@pytest.mark.parametrize("quantization", [None, "fp8-all"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_stored_head(folder, kind, quantization):
    exact = write_stored_head(folder, kind)
    model = load(folder, quantization=quantization)
    assert model.quantization == "fp8-all"
    head = model.weights.lm_head
    exact = exact[: len(head.values)]
    if "block" in kind:  # quantised again, by row
        values, scale = by_row(exact)
        used = scale > 0
        torch.testing.assert_close(head.scale[used], scale[used])
        torch.testing.assert_close(head.values.float()[used], values[used], rtol=2**-3, atol=2**-9)
    else:
        assert torch.equal(head.float(), exact)
    assert model.logits([PROMPT]).isfinite().all()


def test_a_stored_head_is_no_head_in_16_bits(folder):
    write_stored_head(folder, "channel")
    message = f"{head_of(folder)}': expected dtype F32, F16, BF16 with quantization 'fp8', got F8_E4M3, which"
    with pytest.raises(CheckpointError, match=message):
        load(folder, quantization="fp8")


def test_a_head_in_16_bits_beside_stored_layers(folder):
    head = load_all(folder).weights.lm_head
    write_stored(folder, "channel")
    assert load(folder).quantization == "fp8"
    model = load_all(folder)
    assert model.quantization == "fp8-all" and same(model.weights.lm_head, head)


def test_a_tied_head_must_not_be_stored_in_e4m3(tmp_path):
    TIED["dream"](tmp_path)
    tensors = plain_models.read_weights(tmp_path)
    tensors[HEAD] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{HEAD}': expected the tied embedding again or nothing, .*F8"):
        load_all(tmp_path)


# A model that is dealt out.


@pytest.mark.parametrize("write", [WRITERS["llada"], WRITERS["dream"], TIED["llada"]])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_ranks_are_rows_of_the_head(tmp_path, write, size):
    """Vocabularies that no number of ranks divides; a row has the same scale wherever it is."""
    write(tmp_path)
    model = load_all(tmp_path)
    heads = []
    for rank in range(size):
        shard = Shard(model.spec, rank, size)
        part = checkpoint.load_weights(
            tmp_path, shard.local_spec, "cpu", torch.float32, shard=shard, quantization="fp8-all"
        )
        assert len(part.lm_head.values) == len(shard.vocabulary) == len(part.lm_head.scale)
        assert torch.equal(part.embedding, model.weights.embedding)
        heads.append(part.lm_head)
    whole = QuantizedWeight(
        torch.cat([head.values.view(torch.uint8) for head in heads]).view(torch.float8_e4m3fn),
        torch.cat([head.scale for head in heads]),
    )
    assert same(whole, model.weights.lm_head)


two = rank_processes.fixture(2)


@pytest.mark.xdist_group("ranks")
def test_two_ranks(two):
    """The same on both, and as far from fp32 as one process."""
    ids = torch.randint(0, 1414, (8, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 20:] = 1415  # MASK
    options = dict(quantization="fp8-all")
    first, second = two.values(rank_cases.logits_of, "tiny", ids, **options)
    assert torch.equal(first, second)
    exact = blockbatch.load_model("tiny", device="cpu").logits(ids)
    whole = blockbatch.load_model("tiny", device="cpu", **options).logits(ids)
    error, usual = ((logits - exact).norm() / exact.norm() for logits in (first, whole))
    assert 0 < usual and error < 1.25 * usual


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "options", [dict(method="blockbatch", block_sizes=(4, 8, 16)), dict(method="dual_cache", block_size=16)]
)
def test_two_ranks_decode(two, options):
    prompt, options = "Sort: 5 2 9", {**options, "gen_length": 32}
    canvas, _, nfe, *_ = two.same(rank_cases.decode, "tiny", prompt, options, quantization="fp8-all")
    assert len(canvas) == 32 and sum(nfe) > 0
