"""Folders near a supported model: adapters, quantised weights, other models, heads beside tied embeddings."""

import json

import pytest
import torch
from safetensors.torch import save_file

import blockbatch
import plain_models
from blockbatch.models.checkpoint import CheckpointError, read_config, read_spec
from checkpoint_files import edit_config, edit_tensors, load
from test_config_keys import DREAM_7B, LLADA_8B
from test_tokenizer import write_qwen2_files


@pytest.fixture
def folder(tmp_path):
    plain_models.write_llada(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "llada_moe"}, "LLaDA-MoE .'llada_moe'. is not supported .a mixture of experts"),
        ({"model_type": "lladamoe"}, "LLaDA-MoE"),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModel"]}, "LLaDA-MoE .'LLaDAMoEModel'."),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, "GSAI-ML/LLaDA-8B-Instruct runs"),
        ({"model_type": "llada", "num_experts": 64}, "num_experts must be .*a mixture of experts"),
        ({"model_type": "llada2_moe"}, "LLaDA2.x .'llada2_moe'. is not supported"),
        ({"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}, "LLaDA2.x"),
        ({"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"]}, "LLaDA-V or LaViDa"),
        ({"model_type": "mmada"}, "MMaDA .*images"),
        ({**LLADA_8B, "architectures": ["MMadaModelLM"]}, "MMaDA"),
        ({**LLADA_8B, "auto_map": {"AutoModel": "a/b--modeling_mmada.MMadaModelLM"}}, "MMaDA"),
        ({**LLADA_8B, "architectures": ["LLaDAForMultiModalGeneration"]}, "Lumina-DiMOO"),
        ({"model_type": "dimple"}, "Dimple"),
        ({**DREAM_7B, "architectures": ["DreamOnModel"]}, "DreamOn .*grows and shrinks.*Dream-Coder runs"),
        ({"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]}, "SDAR-30B-A3B"),
        ({"model_type": "rnd1", "architectures": ["RND1LM"]}, "RND1"),
        ({"model_type": "bd3lm"}, "BD3-LM"),
        ({"model_type": "qwen2"}, "model_type must be one of .*got 'qwen2': an autoregressive model"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama': an autoregressive model"),
        ({"model_type": "dream"}, "model_type must be one of .*'Dream'.*got 'dream' .capitals count"),
        ({"model_type": "unheard_of"}, "model_type must be one of .*got 'unheard_of'$"),
        ({"model_type": None}, "got None"),
        ({**LLADA_8B, "architectures": ["LLaDALatentModelLM"]}, "architectures must name LLaDAModelLM or"),
        ({**DREAM_7B, "architectures": ["Qwen2ForCausalLM"]}, "architectures must name DreamModel or"),
        ({**DREAM_7B, "architectures": ["DreamModel", "Other"]}, "got 'Other'"),
        ({**LLADA_8B, "architectures": "LLaDAModelLM"}, "architectures must be a list of names"),
    ],
)  # fmt: skip
def test_other_models_are_named(config, message):
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read_spec(config)


@pytest.mark.parametrize("base", [LLADA_8B, DREAM_7B])
def test_fine_tuned_models_of_the_same_shape_load(base):
    """LLaDA-1.5, DiffuCoder, Dream-Coder: other weights, same classes; the class may be left out."""
    for classes in (base["architectures"], [], None):
        assert read_spec({**base, "architectures": classes, "_name_or_path": "apple/DiffuCoder-7B-cpGRPO"})


def test_dreamon_is_known_by_its_tokenizer(tmp_path):
    """Where generation_config.json is missing, config.json is that of Dream."""
    plain_models.write_dream(tmp_path, vocab_size=300)
    write_qwen2_files(tmp_path)
    assert blockbatch.load_model(tmp_path, device="cpu").tokenizer
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|expand|>": 262}))
    with pytest.raises(CheckpointError, match="DreamOn, or a model like it .*Dream-Coder runs"):
        blockbatch.load_model(tmp_path, device="cpu")


# Adapters


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct", "r": 8}


def write_adapter(folder, *, config=True, weights="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if weights:
        save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, folder / weights)


def test_a_folder_that_is_an_adapter(tmp_path):
    write_adapter(tmp_path)
    with pytest.raises(
        CheckpointError, match="is a LORA adapter of 'GSAI-ML/LLaDA-8B-Instruct' and no model"
    ) as error:
        blockbatch.load_model(tmp_path, device="cpu")
    assert "adapter_config.json, adapter_model.safetensors" in str(error.value)
    assert "merge_and_unload" in str(error.value)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "lora.safetensors",
        "pytorch_lora_weights.safetensors", "non_lora_trainables.bin",
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model.safetensors.index.json", None,
    ],
)  # fmt: skip
def test_an_adapter_beside_full_weights(folder, config, weights):
    if not config and weights is None:
        blockbatch.load_model(folder, device="cpu")
        return
    write_adapter(folder, config=config, weights=weights)
    message = "holds (a LORA|an) adapter.* beside a model: .*remove .*got .*adapter=FOLDER"
    with pytest.raises(CheckpointError, match=message):
        blockbatch.load_model(folder, device="cpu")
    with pytest.raises(CheckpointError, match=weights or "adapter_config.json"):
        read_config(folder)


def test_a_broken_adapter_config(folder):
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="adapter_config.json: expected JSON"):
        read_config(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.transformer.blocks.0.q_proj.lora_A.default.weight",
        "base_model.model.model.transformer.blocks.0.q_proj.base_layer.weight",
        "model.transformer.blocks.0.q_proj.lora_magnitude_vector",
        "model.transformer.blocks.0.q_proj.hada_w1_a",
    ],
)
def test_an_adapter_inside_the_weights(folder, name):
    edit_tensors(folder, **{name.replace(".", "__"): torch.ones(2)})
    with pytest.raises(CheckpointError, match="holds tensors of an adapter .*adapter=FOLDER"):
        load(folder)


def test_an_adapter_in_another_file_of_the_folder(folder):
    save_file({"model.x.lora_B.weight": torch.ones(2)}, folder / "extra.safetensors")
    with pytest.raises(CheckpointError, match="extra.safetensors: holds tensors of an adapter"):
        load(folder)


# Weights that are not what they should be


WEIGHT = "model.transformer.blocks.1.up_proj.weight"
KEY = WEIGHT.replace(".", "__")


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {KEY: torch.ones(48, 32).to(torch.float8_e4m3fn)},
            f"{WEIGHT}'?: expected dtype .* got F8_E4M3: quantised",
        ),
        (
            {KEY: torch.ones(48, 32).to(torch.float8_e4m3fn), KEY + "_scale_inv": torch.ones(1, 1)},
            f"got F8_E4M3, with {WEIGHT}_scale_inv beside it: quantised weights are not read",
        ),
        ({KEY: torch.ones(48, 32).to(torch.float8_e5m2)}, "got F8_E5M2: quantised"),
        (
            {KEY: torch.ones(768, 1, dtype=torch.uint8), KEY + "__absmax": torch.ones(24)},
            "got U8, with .*absmax",
        ),
        (
            {
                KEY: None,
                KEY[:-8] + "__qweight": torch.ones(4, 48).int(),
                KEY[:-8] + "__scales": torch.ones(1, 48),
            },
            "expected plain weights, got .*up_proj.qweight and 1 more: quantised",
        ),
        (
            {KEY: None, KEY + "_packed": torch.ones(48, 4).int()},
            "expected plain weights, got .*weight_packed",
        ),
    ],
)
def test_quantised_weights_say_so(folder, tensors, message):
    edit_tensors(folder, **tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(error.value).endswith("load the F32, F16 or BF16 checkpoint that they were made from")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight", "a mixture of experts"),
        ("model.vision_tower.conv.weight", "a model that reads images"),
        ("model.transformer.blocks.0.q_norm.weight", "norms of queries and keys"),
        ("_orig_mod.model.x.weight", "torch.compile"),
        ("model.nothing.known", ": model.nothing.known$"),
    ],
)
def test_superfluous_tensors_say_what_they_belong_to(folder, name, kind):
    edit_tensors(folder, **{name.replace(".", "__"): torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"superfluous tensors .*{kind}"):
        load(folder)


def test_weights_of_less_than_a_byte(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[WEIGHT]["dtype"] = "F4"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match=f"{WEIGHT}.*got F4: quantised weights are not read"):
        load(folder)


# Folders that are not model folders


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.gguf", "GGUF files are not read"),
        ("snapshots/0/config.json", "a folder of the HuggingFace cache: give the hub id"),
        ("checkpoint-500/config.json", "its folder checkpoint-500 holds one"),
        ("model_index.json", "a pipeline of diffusers"),
        ("README.md", "there is none$"),
    ],
)
def test_a_folder_without_a_model(tmp_path, name, message):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"expected a config.json, .*{message}"):
        read_config(tmp_path)


def test_gguf_beside_a_configuration(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match="there are none; GGUF files are not read"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"]
)
def test_pointers_of_git_lfs(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{name}: expected .*a pointer of Git LFS: fetch the file"):
        blockbatch.load_model(folder, device="cpu")


# An LM head beside tied embeddings


TIED = {
    "llada": (
        plain_models.write_llada, "weight_tying", "model.transformer.wte.weight",
        "model.transformer.ff_out.weight",
    ),
    "dream": (plain_models.write_dream, "tie_word_embeddings", "model.embed_tokens.weight", "lm_head.weight"),
}  # fmt: skip


@pytest.fixture(params=TIED)
def tied(request, tmp_path):
    """A folder with tied embeddings, its plain weights, and the names of the embedding and the head."""
    write, option, embedding, head = TIED[request.param]
    write(tmp_path, **{option: True})
    return tmp_path, plain_models.read_weights(tmp_path)[embedding], embedding, head


def stored(folder, **tensors):
    edit_tensors(folder, **{name.replace(".", "__"): tensor for name, tensor in tensors.items()})


def test_an_equal_head_is_the_embedding(tied):
    folder, table, _, head = tied
    expected = load(folder)[1]
    stored(folder, **{head: table.clone()})
    for dtype in (torch.float32, torch.bfloat16):
        weights = load(folder, dtype)[1]
        assert weights.lm_head.data_ptr() == weights.embedding.data_ptr()
        assert torch.equal(weights.embedding, expected.embedding.to(dtype))


def test_an_equal_head_in_another_dtype(tied):
    folder, table, embedding, head = tied
    stored(folder, **{embedding: table.bfloat16(), head: table.bfloat16().float()})
    load(folder)
    stored(folder, **{head: table})
    with pytest.raises(CheckpointError, match=f"{head}.*expected the values of {embedding!r}"):
        load(folder)


@pytest.mark.parametrize("row", [0, 17, 39])
def test_another_head_is_refused(tied, monkeypatch, row):
    folder, table, embedding, head = tied
    changed = table.clone()
    changed[row, 31] += 0.5
    stored(folder, **{head: changed})
    for piece in (1 << 20, 100):
        monkeypatch.setattr("blockbatch.models.tied_head._PIECE", piece)
        with pytest.raises(
            CheckpointError, match=f"{head}.*since config.json ties them, got others from row {row}"
        ):
            load(folder)


def test_a_head_of_another_shape_or_kind_is_refused(tied):
    folder, table, _, head = tied
    stored(folder, **{head: table.double()})
    with pytest.raises(CheckpointError, match=rf"{head}.*expected the tied embedding .*got F64 \[40, 32\]"):
        load(folder)
    stored(folder, **{head: table[:39].clone()})
    with pytest.raises(CheckpointError, match=rf"{head}.*expected the tied embedding .*got F32 \[39, 32\]"):
        load(folder)


def test_the_head_alone_stands_for_both(tied):
    folder, table, embedding, head = tied
    stored(folder, **{embedding: None, head: table.clone()})
    weights = load(folder)[1]
    assert torch.equal(weights.embedding, table) and torch.equal(weights.lm_head, table)


def test_rows_beyond_the_vocabulary_may_differ(tmp_path):
    plain_models.write_llada(tmp_path, vocab_size=40, embedding_size=64, weight_tying=True)
    table = plain_models.read_weights(tmp_path)["model.transformer.wte.weight"]
    changed = table.clone()
    changed[40:] = 0
    stored(tmp_path, **{"model.transformer.ff_out.weight": changed})
    assert torch.equal(load(tmp_path)[1].lm_head, table[:40])


def test_untied_models_need_their_head(tied):
    folder, *_, head = tied
    edit_config(folder, **{"weight_tying" if "ff_out" in head else "tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=f"missing tensors .*{head}"):
        load(folder)
