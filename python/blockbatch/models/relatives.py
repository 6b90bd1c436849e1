"""Models that stand near the supported ones, known by name: refused with what they are and what runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blockbatch.models.spec import CheckpointError

EXPAND_TOKEN = "<|expand|>"  # one MASK becomes two

_EXPERTS = "a mixture of experts"
_IMAGES = "it reads images beside text"
_LLADA = "GSAI-ML/LLaDA-8B-Instruct runs"
_DREAM = "Dream-org/Dream-v0-Instruct-7B runs"
_BOTH = "LLaDA-8B, LLaDA-1.5, Dream-7B, DiffuCoder and Dream-Coder run"
# What a model_type or a class name holds, in small letters without - and _; the model, what it needs, and
# what runs instead.
_RELATIVES = (
    ("llada2", "LLaDA2.x", f"{_EXPERTS} with partial rotary embeddings", _LLADA),
    ("lladamoe", "LLaDA-MoE", _EXPERTS, _LLADA),
    ("llavallada", "LLaDA-V or LaViDa", _IMAGES, _LLADA),
    ("llavadream", "LaViDa on Dream", _IMAGES, _DREAM),
    ("lladav", "LLaDA-V", _IMAGES, _LLADA),
    ("lavida", "LaViDa", _IMAGES, _BOTH),
    ("mmada", "MMaDA", "its vocabulary holds images beside text", _LLADA),
    ("lladaformultimodal", "Lumina-DiMOO", "its vocabulary holds images beside text", _LLADA),
    ("lladalooped", "a looped LLaDA", "its layers run several times", _LLADA),
    ("dimple", "Dimple", _IMAGES, _DREAM),
    ("dreamvl", "Dream-VL or Dream-VLA", _IMAGES, _DREAM),
    ("dreamon", "DreamOn", "its canvas grows and shrinks while it decodes", "Dream-Coder runs"),
    ("sdarmoe", "SDAR-30B-A3B", _EXPERTS, _BOTH),
    ("sdarv", "SDAR-VL", _IMAGES, _BOTH),
    ("diffusionvl", "DiffusionVL", _IMAGES, _BOTH),
    ("diffusiongemma", "DiffusionGemma", f"{_EXPERTS} that has no MASK", _BOTH),
    ("nemotron", "Nemotron-Labs-Diffusion", "scaled queries and a causal pass over each block", _BOTH),
    (
        "ministral3diffusion",
        "Nemotron-Labs-Diffusion",
        "scaled queries and a causal pass over each block",
        _BOTH,
    ),
    ("rnd1", "RND1", _EXPERTS, _BOTH),
    ("wedlm", "WeDLM", "its attention is causal", _BOTH),
    ("bd3lm", "BD3-LM", "a transformer conditioned on time, with stochastic samplers", _BOTH),
    ("mdlm", "MDLM", "a transformer conditioned on time, with stochastic samplers", _BOTH),
    ("sedd", "SEDD", "a transformer conditioned on time that predicts ratios", _BOTH),
    ("a2d", "a model of dllm's recipe from an autoregressive one", "its classes are not read", _BOTH),
)
# Exact model types whose models predict the next token from those before.
_AUTOREGRESSIVE = re.compile(
    r"llama|qwen[23]\w*|mi[sx]tral\w*|gpt\w*|gemma\w*|phi\d?\w*|olmo\w*|deepseek\w*|falcon\w*|opt|bloom|glm\w*"
    r"|chatglm|internlm\w*|starcoder\w*|stablelm|granite\w*|smollm\w*|mamba\w*|rwkv\w*|cohere\w*|yi|exaone\w*"
)
# Class names of the supported models, by model_type.
_CLASSES = {
    "llada": ("LLaDAModelLM", "LLaDAModel", "LLaDAForCausalLM"),
    "Dream": ("DreamModel", "DreamBaseModel", "DreamForCausalLM"),
    "sdar": ("SDARForCausalLM", "SDARModel"),
    "Fast_dLLM_Qwen": ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenModel"),
}


def check_model(config: Mapping[str, Any], supported: tuple[str, ...]) -> str:
    """The model_type of a supported model.

    Args:
        config: the content of a config.json.
        supported: the model types that can be read.

    Raises:
        CheckpointError: a known relative, an autoregressive model, another model_type, or a class name that
            is not one of the supported models' (its code may compute something else).
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"config.json: architectures must be a list of names, got {classes!r:.100}")
    model_type = config.get("model_type")
    for name in _names(config, classes):
        plain = re.sub(r"[-_ ]", "", name).lower()
        for part, model, need, instead in _RELATIVES:
            if part in plain:
                raise CheckpointError(f"config.json: {model} ({name!r}) is not supported ({need}); {instead}")
    if not isinstance(model_type, str) or model_type not in supported:
        more = ""
        if isinstance(model_type, str) and _AUTOREGRESSIVE.fullmatch(model_type.lower()):
            more = ": an autoregressive model, which has no MASK; masked diffusion models are decoded here"
        elif isinstance(model_type, str) and model_type.lower() in map(str.lower, supported):
            more = " (capitals count)"
        raise CheckpointError(
            f"config.json: model_type must be one of {', '.join(map(repr, supported))}, got {model_type!r}"
            + more
        )
    known = _CLASSES.get(model_type)
    for name in classes:
        if known is not None and name not in known:
            raise CheckpointError(
                f"config.json: architectures must name {' or '.join(known)} with model_type {model_type!r}, "
                f"got {name!r}: its code may compute something else"
            )
    return model_type


def check_tokenizer(token_to_id: Callable[[str], int | None], folder: Path) -> None:
    """Refuse the tokenizer of DreamOn, whose config.json is Dream's."""
    if token_to_id(EXPAND_TOKEN) is not None:
        raise CheckpointError(
            f"{folder}: DreamOn, or a model like it (its tokenizer has the token {EXPAND_TOKEN!r}), is not "
            "supported (its canvas grows and shrinks while it decodes); Dream-Coder runs"
        )


def _names(config: Mapping[str, Any], classes: list[str]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    yield from classes
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict):
        for key, target in auto_map.items():
            # "owner/name--file.Class": the class alone says what the model is.
            if key.startswith("AutoModel") and isinstance(target, str):
                yield target.rpartition(".")[2]
