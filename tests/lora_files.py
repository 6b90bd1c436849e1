"""Random adapters in PEFT's layout, and models with one merged by hand."""

import json

import torch
from safetensors.torch import save_file

import block_models
import plain_models

FAMILIES = ("llada", "dream", "sdar", "fast_dllm_v2")
LLADA = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "blocks.0.ff_out", "blocks.1.ff_out")
QWEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_model(folder, family):
    if family in ("llada", "dream"):
        getattr(plain_models, f"write_{family}")(folder)
    else:
        block_models.write(folder, family)
    return folder


def targets_of(family):
    return LLADA if family == "llada" else QWEN


def write_adapter(folder, base, targets, *, rank=4, ranks=None, seed=0, **config):
    """Random factors for every 2-dim weight of `base` whose module ends in one of `targets`; returns them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in plain_models.read_weights(base).items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or not module.endswith(tuple(targets)):
            continue
        r = next((r for end, r in (ranks or {}).items() if module.endswith(end)), rank)
        a = torch.randn(r, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], r, generator=generator) * 0.1
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": rank, "lora_alpha": 8,
        "bias": "none",
        "target_modules": list(targets), "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "modules_to_save": None, "layers_to_transform": None, "init_lora_weights": True, "lora_dropout": 0.05,
        "rank_pattern": {}, "alpha_pattern": {}, "task_type": None, "inference_mode": True,
        "megatron_core": "megatron.core", "loftq_config": {}, "qalora_group_size": 16, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def merge_by_hand(base, folder, tensors, scale_of):
    """A folder of the model with the factors merged in float32, as plain float32 tensors."""
    weights = {name: tensor.float() for name, tensor in plain_models.read_weights(base).items()}
    for name in tensors:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale_of(module) * delta
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_file(weights, folder / "model.safetensors")


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
