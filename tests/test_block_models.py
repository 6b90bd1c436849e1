"""SDAR and Fast-dLLM v2 checkpoints: logits, K and V of the published code, and what folders say."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import blockbatch
import fast_interpreter
from block_causal_data import DATA, MASK, load
from blockbatch.decoding.block_forward import BlockForward
from blockbatch.decoding.block_text import BlockText
from blockbatch.models import CheckpointError
from blockbatch.models.chat import format_chat
from blockbatch.text_pages import TextPages
from blockbatch_kernels import triton
from interpreter import in_interpreter, run_in_the_interpreter
from test_tokenizer import write_tokenizer

if triton.interpreted():
    fast_interpreter.replace_language_once()

FOLDERS = ("sdar", "fast_dllm_v2", "fast_dllm_v2_tied")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As asked for; what torch itself differs by between orders of summation is about 3e-5.
TOLERANCE = 1e-4


def check_cases(folder, **options):
    """Logits of every case, and K and V of those with stored positions."""
    model = load(folder, **options)
    cases = load_file(DATA / folder / "expected.safetensors")
    names = [name.removesuffix(".ids") for name in cases if name.endswith(".ids")]
    assert len(names) >= 2
    for name in names:
        ids, split, size = (cases[f"{name}.{part}"] for part in ("ids", "split", "block"))
        logits = model.logits(ids.tolist(), block_size=int(size))[0, int(split) :].cpu()
        assert (logits - cases[f"{name}.logits"]).abs().max() < TOLERANCE, name
        if split:
            check_stored(model, ids.tolist(), int(split), int(size), name, cases)


def new_pool(model):
    spec = model.spec
    sizes = dict(num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    return TextPages(64, **sizes, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def check_stored(model, ids, split, size, name, cases):
    """A prefill of the first `split` positions into pages, and the rest on top of it."""
    pool = new_pool(model)
    text = BlockText(ids, pool, model.spec.max_length, MASK)
    assert text.make_room(len(ids))
    run = BlockForward(model, pool).run
    run(text.blocks(0, split, size), 4096)
    for layer in range(model.spec.num_layers):
        for index, part in enumerate("kv"):
            got = pool.kv[layer, index, text.pages].flatten(0, 1)[:split].cpu()
            assert (got - cases[f"{name}.{part}{layer}"]).abs().max() < TOLERANCE, (name, layer)
    logits = cases[f"{name}.logits"]
    rows = run(text.blocks(split, len(ids), size, range(split, len(ids))), 4096)
    tops, confidences = zip(*(pair for row in rows for pair in row), strict=True)
    assert list(tops) == logits.argmax(-1).tolist()
    expected = logits.softmax(-1).amax(-1)
    assert (torch.tensor(confidences) - expected).abs().max() < TOLERANCE
    text.release()
    assert pool.pages_in_use == 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_and_stored_keys_and_values(folder):
    check_cases(folder, backend="reference")


@in_interpreter
@pytest.mark.parametrize("folder", FOLDERS)
def test_interpreted_triton(folder):
    check_cases(folder, backend="triton")


def test_on_triton():
    if not triton.interpreted():
        run_in_the_interpreter(__file__, "-k", "test_interpreted_triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_on_a_gpu(folder, backend):
    check_cases(folder, device="cuda", dtype="float32", backend=backend)


def changed(tmp_path, folder, changes, name="model"):
    target = tmp_path / name
    shutil.copytree(DATA / folder, target)
    settings = json.loads((target / "config.json").read_text())
    for key, value in changes.items():
        settings.pop(key, None)
        if value is not ...:
            settings[key] = value
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_what_config_json_leaves_out(tmp_path):
    bare = {"block_size": ..., "mask_token_id": ...}
    model = blockbatch.load_model(changed(tmp_path, "sdar", bare), device="cpu")
    assert (model.spec.block_size, model.spec.mask_token_id) == (4, None)
    folder = changed(tmp_path, "sdar", bare, name="SDAR-tiny-Chat-b32")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [125, 124]}))
    model = blockbatch.load_model(folder, device="cpu", mask_token_id=MASK)
    assert (model.spec.block_size, model.spec.mask_token_id) == (32, MASK)
    assert model.eos_token_ids == (124, 125)
    folder = changed(tmp_path, "sdar", {"block_size": 8}, name="odd-b32")
    assert blockbatch.load_model(folder, device="cpu").spec.block_size == 8


def test_mask_and_ends_of_a_tokenizer(tmp_path):
    # The random checkpoints have 128 ids, a byte-level tokenizer has 256 and more.
    for folder, mask in (("sdar", "<|MASK|>"), ("fast_dllm_v2", "|<MASK>|")):
        target = wide(tmp_path, folder)
        write_tokenizer(target, (*QWEN, mask))
        model = blockbatch.load_model(target, device="cpu")
        assert model.spec.mask_token_id == model.tokenizer.token_to_id(mask) == 259
        ends = [model.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
        assert model.eos_token_ids == (tuple(sorted([124, *ends])) if folder == "sdar" else (125,))
        write_tokenizer(target, QWEN)
        with pytest.raises(CheckpointError, match=r"mask_token_id: expected it in config.json, or the token"):
            blockbatch.load_model(target, device="cpu")


def wide(tmp_path, folder):
    """The checkpoint with room for 260 ids."""
    from safetensors.torch import save_file

    target = changed(tmp_path, folder, {"vocab_size": 260, "mask_token_id": ...}, name=f"wide-{folder}")
    tensors = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.zeros(260 - 128, 64)))
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    "folder, changes, message",
    [
        ("sdar", {"attention_bias": True}, "attention_bias must be False"),
        ("sdar", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("sdar", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling must be null"),
        ("sdar", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("sdar", {"layer_types": ["sliding_attention"] * 2}, "layer_types must all be 'full_attention'"),
        ("sdar", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("sdar", {"mask_token_id": 128}, r"mask_token_id must lie in \[0, vocab_size = 128\), got 128"),
        ("sdar", {"mask_token_id": 124}, "mask_token_id 124 must not be one of eos_token_ids"),
        ("sdar", {"head_dim": 16}, "expected shape"),
        ("sdar", {"hidden_size": ...}, "hidden_size is missing"),
        ("fast_dllm_v2", {"attention_bias": False}, "attention_bias must be True"),
        ("fast_dllm_v2", {"head_dim": 24}, "must divide hidden_size = 64 into heads of head_dim, got 4"),
        (
            "fast_dllm_v2",
            {"tie_word_embeddings": True},
            "'lm_head.weight': expected the values of 'model.embed_tokens.weight'",
        ),
        ("fast_dllm_v2_tied", {"tie_word_embeddings": False}, "missing tensors .* lm_head.weight"),
        ("sdar", {"model_type": "llada2_moe"}, r"LLaDA2.x \('llada2_moe'\) is not supported"),
        ("sdar", {"model_type": "sdar_moe"}, "SDAR-30B-A3B .* is not supported"),
        ("sdar", {"model_type": "diffusion_gemma"}, "DiffusionGemma .* is not supported"),
        ("sdar", {"model_type": "x", "architectures": ["NemotronLabsDiffusionModel"]}, "Nemotron-Labs"),
    ],
)
def test_bad_folders(tmp_path, folder, changes, message):
    with pytest.raises(CheckpointError, match=message):
        blockbatch.load_model(changed(tmp_path, folder, changes), device="cpu")


def test_a_given_mask_token_id_is_checked():
    with pytest.raises(ValueError, match="mask_token_id: expected an id from 0 to 127, got 128"):
        blockbatch.load_model(DATA / "sdar", device="cpu", mask_token_id=128)
    with pytest.raises(ValueError, match="mask_token_id: expected None, since config.json of llada names it"):
        blockbatch.load_model("tiny", device="cpu", mask_token_id=1)
    with pytest.raises(ValueError, match="block_size: expected None for llada, got 4"):
        blockbatch.load_model("tiny", device="cpu").logits([1, 2], block_size=4)


def test_chat_formats():
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo."},
        {"role": "user", "content": "Three?"},
    ]

    def chat(messages, family, **options):
        return format_chat(messages, family, lambda token: 1, **options)

    asked = "<|im_start|>user\nOne?<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert chat("One?", "sdar") == asked + answer == chat("One?", "sdar", enable_thinking=True)
    assert chat("One?", "sdar", enable_thinking=False) == asked + answer + "<think>\n\n</think>\n\n"
    assert chat(turns, "sdar") == (
        f"{asked}{answer}Two.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n{answer}"
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert chat("One?", "fast_dllm_v2") == chat("One?", "dream") == system + asked + answer
    with pytest.raises(ValueError, match="enable_thinking must be None for dream, got False"):
        chat("One?", "dream", enable_thinking=False)
