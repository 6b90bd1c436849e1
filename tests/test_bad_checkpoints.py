"""Reading model folders: all that can be wrong with one is refused, by a message that says what."""

import json
import shutil

import pytest
import torch

import plain_models
from blockbatch.models.checkpoint import CheckpointError, load_weights, read_config, read_spec
from checkpoint_files import edit_config, edit_tensors, load


@pytest.fixture
def folder(tmp_path):
    plain_models.write_llada(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    plain_models.write_llada(tmp_path / "model", shards=3)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model_type="llama"),
            "model_type must be one of 'llada', 'Dream', 'sdar', 'Fast_dLLM_Qwen', got 'llama'",
        ),
        (dict(model_type=...), "model_type .* got None"),
        (dict(block_type="sequential"), "block_type must be 'llama' .* got 'sequential'"),
        (dict(block_type=...), "block_type .* absent, which means 'sequential'"),
        (dict(block_group_size=2), "block_group_size must be 1 .* got 2"),
        (dict(layer_norm_type="default"), "layer_norm_type must be 'rms' .* got 'default'"),
        (dict(layer_norm_with_affine=False), "layer_norm_with_affine must be True .* got False"),
        (dict(activation_type="gelu"), "activation_type must be 'silu' .* got 'gelu'"),
        (dict(activation_type="swiglu"), "activation_type must be 'silu' .* got 'swiglu'"),
        (dict(rope=False), "rope must be True .* got False"),
        (dict(rope=...), "rope must be True .* absent"),
        (dict(rope_full_precision=False), "rope_full_precision must be True"),
        (dict(alibi=True), "alibi must be False .* got True"),
        (dict(include_bias=True), "include_bias must be False .* got True"),
        (dict(bias_for_layer_norm=True), "bias_for_layer_norm must be False or None .* got True"),
        (dict(attention_layer_norm=True), "attention_layer_norm must be False"),
        (dict(input_emb_norm=True), "input_emb_norm must be False"),
        (dict(scale_logits=True), "scale_logits must be False"),
        (dict(clip_qkv=8.0), "clip_qkv must be None .* got 8.0"),
        (dict(d_model=...), "d_model is missing"),
        (dict(n_layers=...), "n_layers is missing"),
        (dict(vocab_size=None), "vocab_size is missing"),
        (dict(mask_token_id=...), "mask_token_id is missing"),
        (dict(n_layers="two"), "n_layers must be an integer, got 'two'"),
        (dict(n_layers=True), "n_layers must be an integer, got True"),
        (dict(n_layers=0), "num_layers must be at least 1, got 0"),
        (dict(rope_theta="big"), "rope_theta must be a number, got 'big'"),
        (dict(rms_norm_eps=0), "rms_norm_eps must be above 0 and finite, got 0"),
        (dict(weight_tying="no"), "weight_tying must be true or false, got 'no'"),
        (dict(n_heads=5), "n_heads must divide d_model = 32, got 5"),
        (dict(n_kv_heads=3), "num_kv_heads must divide the 4 query heads, got 3"),
        (dict(n_heads=32), "head_dim must be even .* got 1"),
        (dict(embedding_size=39), "embedding_size must be at least vocab_size = 40, got 39"),
        (dict(mask_token_id=40), r"mask_token_id must lie in \[0, vocab_size = 40\), got 40"),
        (dict(eos_token_id=-1), r"eos_token_ids must lie in \[0, vocab_size = 40\), got -1"),
        (dict(eos_token_id="</s>"), "eos_token_id must be an integer or a list of integers, got '</s>'"),
        (dict(eos_token_id=39), "mask_token_id 39 must not be one of eos_token_ids"),
    ],
)
def test_unsupported_llada_configuration(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_spec(read_config(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_act="gelu"), "hidden_act must be 'silu' .* got 'gelu'"),
        (dict(use_sliding_window=True), "use_sliding_window must be False .* got True"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types must all be"),
        (dict(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling must be null .* got .*yarn"),
        (dict(rope_parameters={"rope_type": "linear"}), "rope_parameters must be null .* got .*linear"),
        (dict(head_dim=16), "head_dim must be hidden_size / num_attention_heads = 8, got 16"),
        (dict(num_attention_heads=5), "num_attention_heads must divide hidden_size = 32, got 5"),
        (dict(intermediate_size=...), "intermediate_size is missing"),
    ],
)
def test_unsupported_dream_configuration(tmp_path, changes, message):
    plain_models.write_dream(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_spec(read_config(tmp_path))


def test_dream_rope_parameters_of_newer_configurations(tmp_path):
    plain_models.write_dream(tmp_path)
    edit_config(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    assert read_spec(read_config(tmp_path)).rope_theta == 12345.0


@pytest.mark.parametrize("content", ["{", "[1]", "\ufeff"])
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json: expected"):
        read_config(folder)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="expected a config.json"):
        read_config(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected weights as \*.safetensors files, there are none"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="only pickled ones .never opened.: pytorch_model.bin"):
        load(folder)


def test_unsupported_dtype_argument(folder):
    spec = read_spec(read_config(folder))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got torch.int8"):
        load_weights(folder, spec, "cpu", torch.int8)


WEIGHT = "model.transformer.blocks.1.up_proj.weight"
KEY = WEIGHT.replace(".", "__")


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({KEY: None}, f"missing tensors .*{WEIGHT}"),
        ({"extra__weight": torch.ones(2)}, "superfluous tensors .*extra.weight"),
        ({KEY: torch.ones(48, 31)}, rf"{WEIGHT}.*: expected shape \[48, 32\], got \[48, 31\]"),
        ({KEY: torch.ones(32, 48)}, rf"{WEIGHT}.*: expected shape \[48, 32\], got \[32, 48\]"),
        ({KEY: torch.ones(48, 32, dtype=torch.int8)}, f"{WEIGHT}.*: expected dtype F32, F16, BF16, got I8"),
        ({KEY: torch.ones(48, 32, dtype=torch.float64)}, f"{WEIGHT}.*: expected dtype .* got F64"),
    ],
)
def test_wrong_tensors_are_refused_before_anything_is_allocated(folder, monkeypatch, tensors, message):
    edit_tensors(folder, **tensors)
    monkeypatch.setattr("blockbatch.models.checkpoint.allocate", None)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(folder, value):
    weight = torch.ones(48, 32)
    weight[47, 31] = value
    edit_tensors(folder, **{KEY: weight})
    with pytest.raises(CheckpointError, match=f"{WEIGHT}.*expected finite values in float32"):
        load(folder)


def test_values_out_of_the_dtype_s_range(folder):
    edit_tensors(folder, **{KEY: torch.full((48, 32), 1e5)})
    load(folder)
    with pytest.raises(CheckpointError, match=f"{WEIGHT}.*expected finite values in float16"):
        load(folder, torch.float16)


def rewrite_header(path, edit):
    """Applies `edit` to the header of a safetensors file, leaving the data as they are."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = edit(json.loads(raw[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def with_entry(**fields):
    return lambda header: {**header, WEIGHT: {**header[WEIGHT], **fields}}


def with_offsets_moved(header):
    begin, end = header[WEIGHT]["data_offsets"]
    return {**header, WEIGHT: {**header[WEIGHT], "data_offsets": [begin + 4, end + 4]}}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda header: b"{" * 50, "corrupted: expected JSON in the header"),
        (lambda header: b"\xff\xfe" * 50, "corrupted: expected JSON in the header"),
        (lambda header: b"[" * 100_000, "corrupted: expected JSON in the header"),
        (lambda header: [], "corrupted: expected a JSON object"),
        (lambda header: b'{"a": 1, "a": 2}', "corrupted: .*the same key twice"),
        (lambda header: {**header, WEIGHT: 3}, "corrupted: expected dtype, shape and data_offsets"),
        (with_entry(shape="48"), "corrupted: expected dtype, shape and data_offsets"),
        (with_entry(shape=[-48, -32]), "corrupted: expected dtype, shape and data_offsets"),
        (with_entry(data_offsets=[0]), "corrupted: expected dtype, shape and data_offsets"),
        (with_entry(dtype="F31"), "expected one of .* as dtype, got 'F31'"),
        (with_entry(shape=[48, 33]), "expected 6336 bytes .* got 6144"),
        (with_offsets_moved, "corrupted: expected tensor .* at byte"),
        (lambda header: {name: header[name] for name in header if name != WEIGHT}, "corrupted: expected"),
    ],
)
def test_corrupted_header(folder, edit, message):
    rewrite_header(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_file(folder, monkeypatch, keep):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if keep == 0.5 else keep])
    monkeypatch.setattr("blockbatch.models.checkpoint.allocate", None)
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        load(folder)


def test_bytes_behind_the_data(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="corrupted: expected .* bytes of data"):
        load(folder)


def test_a_file_that_is_no_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + b"\xff" * 1000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)


INDEX = "model.safetensors.index.json"


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_index_names_a_missing_file(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="names the file model-00002-of-00003.safetensors, which is missing"
    ):
        load(sharded)


def test_index_names_a_missing_tensor(sharded):
    edit_index(sharded, lambda places: places.update(ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="tensor 'ghost' in model-00001.*but no file holds it"):
        load(sharded)


def test_index_places_a_tensor_in_the_wrong_file(sharded):
    def move(places):
        name = next(name for name in places if places[name].startswith("model-00001"))
        places[name] = "model-00002-of-00003.safetensors"

    edit_index(sharded, move)
    with pytest.raises(CheckpointError, match="in model-00002.*but it is in model-00001"):
        load(sharded)


def test_index_leaves_a_tensor_out(sharded):
    edit_index(sharded, lambda places: places.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=f"the index does not name: {WEIGHT}"):
        load(sharded)


def test_index_leads_out_of_the_folder(sharded):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda places: places.update({WEIGHT: "../outside.safetensors"}))
    with pytest.raises(CheckpointError, match="expected names of safetensors files in the folder"):
        load(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "nonsense"])
def test_broken_index(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index.json: expected"):
        load(sharded)


def test_several_files_without_an_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match="expected model.safetensors, or an index"):
        load(sharded)


def test_a_tensor_in_two_shards(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="expected once, got it in"):
        load(sharded)
