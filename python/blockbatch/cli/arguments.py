"""Arguments that several commands share, and the settings and models made of them. It imports no command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from blockbatch.cli import ranks
from blockbatch.cli.help import rows
from blockbatch.config import DecodeConfig
from blockbatch.methods import BLOCK_METHOD_TABLE, METHOD_TABLE, OPTIONS, PRESET_TABLE

if TYPE_CHECKING:
    from blockbatch.models import Model


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which model runs where, and how it is prompted."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny",
        help="tiny (default) or tiny-block (block diffusion), both built in; a HuggingFace folder; a hub id",
    )
    add_own(group)
    group.add_argument(
        "--chat", action="store_true", help="write the prompt as a user's message in the chat format"
    )
    group.add_argument(
        "--bos",
        action="store_true",
        help="begin prompts with the BOS token, as evaluations of Dream do (as the tokenizer says)",
    )
    group.add_argument("--device", help="cuda (default where there is a GPU), cuda:1, cpu")
    group.add_argument(
        "--dtype", help="float32 (default on the CPU), bfloat16 (default elsewhere) or float16"
    )
    group.add_argument(
        "--quantization",
        help="fp8: layers in 8 bits; fp8-all: the LM head too; left out: as the checkpoint has them",
    )
    group.add_argument("--kv-dtype", help="fp8: keys and values in 8 bits; left out: as --dtype")
    group.add_argument(
        "--whole-rows",
        action="store_true",
        help="under torchrun, on CPUs: processes hold all weights beside their part and deal out whole rows",
    )
    group.add_argument("--backend", help="reference, triton or cuda; left out: the fastest that runs")


def add_thinking(parser: argparse.ArgumentParser) -> None:
    """For commands that write prompts with `encode_text`."""
    parser.add_argument(
        "--no-thinking",
        action="store_true",
        help="SDAR with --chat: begin the answer with an empty think block (enable_thinking=False)",
    )


def add_own(group: Any) -> None:
    """The options that bring an adapter and methods of one's own."""
    group.add_argument(
        "--adapter", metavar="FOLDER", help="a LoRA of PEFT, merged into the weights while they are read"
    )
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module that registers methods of your own (it is run); repeatable",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """The options that `decode_config` reads: one for each row of `blockbatch.methods.OPTIONS`."""
    group = parser.add_argument_group(
        "decoding", "What is left out has the method's own default; none switches a rule off."
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from named settings: {' or '.join(PRESET_TABLE)}; other options change them",
    )
    kinds = {"name": str, "integer": int, "number": float, "integers": int_list, "switch": _switch}
    for option in OPTIONS:
        flag = "--" + option.name.replace("_", "-")
        shown = {"metavar": option.metavar, "help": option.help, "default": argparse.SUPPRESS}
        if option.kind == "texts":
            group.add_argument(flag, action="append", **shown)
        else:
            kind = kinds[option.kind]
            group.add_argument(flag, type=_or_none(kind) if option.none else kind, **shown)


def methods_note() -> str:
    """What each method and each preset is, for the end of a help text."""
    tables = {"Methods": METHOD_TABLE | BLOCK_METHOD_TABLE, "Presets": PRESET_TABLE}
    return "\n\n".join(
        rows(title, {name: row.summary for name, row in table.items()}) for title, table in tables.items()
    )


def load(options: argparse.Namespace) -> Model:
    """The model that the options name."""
    from blockbatch.models import load_model

    return load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        quantization=options.quantization,
        kv_dtype=options.kv_dtype,
        adapter=options.adapter,
        tensor_parallel=ranks.process()[1],
        whole_rows=getattr(options, "whole_rows", False),
    )


def decode_config(options: argparse.Namespace, **more: Any) -> DecodeConfig:
    """The settings: only what was given on the command line, the rest is left to preset and method."""
    given = given_options(options) | more
    preset = given.pop("preset", None)
    return DecodeConfig(**given) if preset is None else DecodeConfig.preset(preset, **given)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The decode options that stand on the command line, `preset` among them."""
    names = (option.name for option in OPTIONS if hasattr(options, option.name))
    given = {name: getattr(options, name) for name in names}
    return given if options.preset is None else {"preset": options.preset, **given}


def default_methods(options: argparse.Namespace) -> tuple[str, ...]:
    """The methods that the named model runs, in the order of a table."""
    from blockbatch.evaluation.settings import BLOCK_TABLE_METHODS, TABLE_METHODS
    from blockbatch.registry import registered_methods

    own = registered_methods()
    if options.model == "tiny":
        return (*TABLE_METHODS, *own)
    from blockbatch.models.model import is_block_causal

    return BLOCK_TABLE_METHODS if is_block_causal(options.model) else (*TABLE_METHODS, *own)


def chat_prompt(model: Model, text: str, *, no_thinking: bool = False) -> str:
    """`text` as a user's message in the model's chat format."""
    if model.tokenizer is None:
        raise ValueError("--chat: expected a model with a tokenizer, got one without")
    if no_thinking and model.spec.family != "sdar":
        raise ValueError(f"--no-thinking: expected a model of the family sdar, got {model.spec.family}")
    return model.tokenizer.chat(text, model.spec.family, enable_thinking=False if no_thinking else None)


def encode_text(model: Model, text: str, options: argparse.Namespace, name: str) -> list[int]:
    """Token ids of a prompt, in the chat format or behind the BOS token if the options say so.

    Args:
        name: what messages call the prompt.
    """
    from blockbatch.prompts import encode_prompt
    from blockbatch.texts import check_text

    check_text(text, name)
    if options.no_thinking and not options.chat:
        raise ValueError("--no-thinking: expected it beside --chat, got it alone")
    if options.chat:
        check_bos(options)
        text = chat_prompt(model, text, no_thinking=options.no_thinking)
        return encode_prompt(model, text, name, add_bos=False)
    return encode_prompt(model, text, name, add_bos=True if options.bos else None)


def check_bos(options: argparse.Namespace) -> None:
    """Raises ValueError for two ways to begin a prompt."""
    if options.bos and options.chat:
        raise ValueError(
            "--bos: expected only without --chat, whose format says how a prompt begins, got both"
        )


def int_list(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 4,8,16, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _switch(text: str) -> bool:
    """on or off"""
    if text.lower() not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text.lower() == "on"


def _or_none(kind: type) -> Any:
    """An argument type that also takes the word none."""

    def convert(text: str) -> Any:
        if text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            expected = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {expected} or none, got {text!r}") from None

    return convert
