"""LoRA of PEFT, merged while the weights are read: equal to merging by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import blockbatch
import plain_models
from blockbatch.models.checkpoint import load_weights, read_config, read_spec
from blockbatch.models.lora import read_adapter
from checkpoint_files import load, run_python
from lora_files import FAMILIES, LLADA, QWEN, edit, merge_by_hand, targets_of, write_adapter, write_model


def tensors_of(weights):
    yield from (weights.embedding, weights.final_norm, weights.lm_head)
    for layer in weights.layers:
        yield from (tensor for tensor in vars(layer).values() if tensor is not None)


def check_equal(base, adapter, merged, dtype):
    spec = read_spec(read_config(base))
    with_adapter = load_weights(base, spec, "cpu", dtype, read_adapter(adapter))
    _, by_hand = load(merged, dtype)
    _, without = load(base, dtype)
    changed = 0
    for ours, theirs, before in zip(*map(tensors_of, (with_adapter, by_hand, without)), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        changed += not torch.equal(ours, before)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_as_by_hand(tmp_path, family, dtype):
    base = write_model(tmp_path / "base", family)
    tensors = write_adapter(tmp_path / "adapter", base, targets_of(family))
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 8 / 4)
    layers = read_spec(read_config(base)).num_layers
    # Query, key and value are one weight of ours; so are gate and up.
    assert check_equal(base, tmp_path / "adapter", tmp_path / "merged", dtype) == 4 * layers


def test_weights_stored_in_bfloat16_are_rounded_once(tmp_path):
    base = write_model(tmp_path / "base", "dream")
    weights = {name: tensor.bfloat16() for name, tensor in plain_models.read_weights(base).items()}
    save_file(weights, base / "model.safetensors")
    tensors = write_adapter(tmp_path / "adapter", base, QWEN)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 2)
    assert check_equal(base, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16) > 0


def test_ranks_alphas_and_rslora_by_module(tmp_path):
    base = write_model(tmp_path / "base", "dream")
    tensors = write_adapter(
        tmp_path / "adapter", base, ("q_proj", "up_proj", "down_proj"), ranks={"0.self_attn.q_proj": 2},
        use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"^model.layers.1.mlp.up_proj": 32, r"mlp\.(up|gate)_proj": 16},
    )  # fmt: skip

    def scale_of(module):
        alpha = 8
        if module.endswith("up_proj"):
            alpha = 32 if ".1." in module else 16
        return alpha / math.sqrt(2 if module.endswith("0.self_attn.q_proj") else 4)

    merge_by_hand(base, tmp_path / "merged", tensors, scale_of)
    assert check_equal(base, tmp_path / "adapter", tmp_path / "merged", torch.float32) > 0


@pytest.mark.parametrize(
    "targets, changes",
    [
        (("q_proj",), {}),
        (("q_proj",), {"target_modules": r".*\.q_proj"}),
        (("0.self_attn.q_proj",), {"target_modules": ["q_proj"], "exclude_modules": ["1.self_attn.q_proj"]}),
        (QWEN, {"target_modules": "all-linear"}),
        (("lm_head",), {}),
    ],
)
def test_ways_to_name_modules(tmp_path, targets, changes):
    base = write_model(tmp_path / "base", "dream")
    tensors = write_adapter(tmp_path / "adapter", base, targets, **changes)
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 2)
    assert check_equal(base, tmp_path / "adapter", tmp_path / "merged", torch.float32) > 0


def test_the_embedding(tmp_path):
    base = write_model(tmp_path / "base", "dream")
    write_adapter(tmp_path / "adapter", base, ())
    table = plain_models.read_weights(base)["model.embed_tokens.weight"]
    a, b = torch.randn(4, len(table)), torch.randn(table.shape[1], 4)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{name}A": a, f"{name}B": b}, tmp_path / "adapter" / "adapter_model.safetensors")
    edit(tmp_path / "adapter", target_modules=["embed_tokens"])
    spec = read_spec(read_config(base))
    weights = load_weights(base, spec, "cpu", torch.float32, read_adapter(tmp_path / "adapter"))
    assert torch.allclose(weights.embedding, table + 2 * (b @ a).T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(weights.embedding, table)


def test_in_shards(tmp_path):
    base = write_model(tmp_path / "base", "llada")
    tensors = write_adapter(tmp_path / "adapter", base, LLADA)
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 2)
    weights = plain_models.read_weights(base)
    files = {name: f"model-0000{1 + place % 3}-of-00003.safetensors" for place, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, base / file)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert check_equal(base, tmp_path / "adapter", tmp_path / "merged", torch.bfloat16) > 0


def test_one_weight_is_held_twice_and_no_more(tmp_path):
    """Peak of the host's memory with an adapter on every weight of the layers."""
    base = tmp_path / "base"
    plain_models.write_dream(base, num_hidden_layers=12, hidden_size=512, intermediate_size=2048)
    write_adapter(tmp_path / "adapter", base, QWEN)
    script = (
        "import resource, sys, torch, blockbatch\n"
        "from blockbatch.models.weights import weight_bytes\n"
        "torch.ones(512, 512) @ torch.ones(512, 512)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = blockbatch.load_model(sys.argv[1], device='cpu', adapter=sys.argv[2])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(1024 * (after - before) - weight_bytes(model.spec, torch.float32))\n"
    )
    above = int(run_python(script, str(base), str(tmp_path / "adapter")))
    # A staging buffer, a weight in float32 and its factors; all weights together are 150 MiB.
    assert above < (16 + 16 + 2 * 4 + 16) << 20


def test_decodes_as_the_merged_model_and_says_so(tmp_path, capsys):
    from blockbatch.cli import main

    base = blockbatch.models.model.BUILT_IN["tiny"]
    tensors = write_adapter(tmp_path / "adapter", base, ("q_proj", "up_proj"), lora_alpha=1)
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 1 / 4)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merged" / file).write_text((base / file).read_text())
    text = "Divide with remainder until zero: 51 and 16."
    config = blockbatch.DecodeConfig(gen_length=32)
    merged = blockbatch.load_model(tmp_path / "merged", device="cpu")
    ours = blockbatch.load_model("tiny", device="cpu", adapter=str(tmp_path / "adapter"))
    expected = blockbatch.generate(merged, text, config)
    assert blockbatch.generate(ours, text, config).canvas == expected.canvas
    assert ours.adapter == str(tmp_path / "adapter") and merged.adapter is None
    trace = tmp_path / "trace.json"
    given = ["--device", "cpu", "--gen-length", "32", "--adapter", str(tmp_path / "adapter")]
    assert main(["generate", text, *given, "--trace", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens
    assert blockbatch.load_trace(trace)["adapter"] == str(tmp_path / "adapter")
    out = tmp_path / "out"
    tasks = ["--tasks", "arithmetic", "--limit", "1", "--methods", "blockbatch"]
    assert main(["eval", *given, *tasks, "--out", str(out)]) == 0
    header = json.loads((out / "results.jsonl").read_text().splitlines()[0])["run"]
    assert header["adapter"] == str(tmp_path / "adapter")
    assert main(["eval", "--device", "cpu", "--gen-length", "32", *tasks, "--out", str(out)]) == 2
    assert "adapter" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_one_weight_is_held_twice(tmp_path, dtype):
    base = tmp_path / "base"
    plain_models.write_dream(base, num_hidden_layers=12, hidden_size=512, intermediate_size=2048)
    tensors = write_adapter(tmp_path / "adapter", base, QWEN)
    merge_by_hand(base, tmp_path / "merged", tensors, lambda module: 2)
    by_hand = load_weights(tmp_path / "merged", read_spec(read_config(base)), "cuda", torch.float32)
    by_hand = [tensor.cpu() for tensor in tensors_of(by_hand)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = blockbatch.load_model(base, device="cuda", dtype=dtype, adapter=tmp_path / "adapter")
    above = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    # The largest weight in float32, its factors, and a piece of the file.
    assert torch.cuda.memory_allocated() > before and above < 2 * 4 * 2048 * 512 + (17 << 20)
    for ours, theirs in zip(tensors_of(model.weights), by_hand, strict=True):
        # float32 sums on another device differ in the last bits, and so may what is rounded from them.
        error = (ours.cpu().float() - theirs).abs() / (theirs.abs() + 1e-2)
        assert error.max() < (1e-4 if dtype == torch.float32 else 2**-8)
