"""The arguments of the command line, and the settings and models made of them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from blockbatch.cli import ablate, evaluate, pictures

if TYPE_CHECKING:
    from blockbatch.config import DecodeConfig
    from blockbatch.models import Model

# The names of the options of `DecodeConfig` that `generate` takes.
DECODE_OPTIONS = (
    "method",
    "gen_length",
    "block_sizes",
    "block_size",
    "threshold",
    "tail_threshold",
    "steps",
    "merge_threshold",
    "sync_threshold",
    "refresh_interval",
    "eos_exit",
    "commit",
    "leap_radius",
    "leap_threshold",
    "eos_token_ids",
    "stop",
)
COMPARE_GEN_LENGTH = 128


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"blockbatch: error: {message}\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        try:
            version = metadata.version("blockbatch")
        except metadata.PackageNotFoundError:  # run from a source folder
            from blockbatch_kernels import __version__ as version
        print(f"blockbatch {version}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser; its result has a function `run` that takes it."""
    parser = _Parser(
        prog="blockbatch",
        description="Fast decoding of masked diffusion language models (LLaDA, Dream).",
        epilog="BLOCKBATCH_TRACEBACK=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_compare(commands)
    evaluate.add_parser(commands)
    ablate.add_parser(commands)
    pictures.add_parser(commands)
    return parser


def load(options: argparse.Namespace) -> Model:
    """The model that the options name."""
    from blockbatch.models import load_model

    return load_model(options.model, device=options.device, dtype=options.dtype, backend=options.backend)


def decode_config(options: argparse.Namespace, **more: Any) -> DecodeConfig:
    """The settings: only what was given on the command line, the rest is left to the method's defaults."""
    from blockbatch.config import DecodeConfig

    given = {name: getattr(options, name) for name in DECODE_OPTIONS if hasattr(options, name)}
    return DecodeConfig(**given, **more)


def chat_prompt(model: Model, text: str) -> str:
    """`text` as a user's message in the model's chat format."""
    if model.tokenizer is None:
        raise ValueError("--chat: expected a model with a tokenizer, got one without")
    return model.tokenizer.chat(text, model.spec.family)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="decode one prompt",
        description="Decode one prompt. A terminal shows the text while it denoises; elsewhere only "
        "the text is written.",
    )
    parser.set_defaults(run=_run_generate)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with the prompt (-: standard input); its last newline is left out",
    )
    group.add_argument("--prompt-ids", type=int_list, metavar="1,2,3", help="the prompt as token ids")
    add_model(parser)
    _add_decoding(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    output.add_argument("--trace", metavar="FILE", help="save what every forward did, as JSON")
    output.add_argument(
        "--trace-kv", action="store_true", help="the trace also holds where the K/V cache of each branch goes"
    )
    output.add_argument("--no-live", action="store_true", help="a terminal, too, gets the text alone")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "decoding", "What is left out has the method's own default; none switches a rule off."
    )

    def add(name: str, type: Any, metavar: str, help: str) -> None:
        group.add_argument(name, type=type, metavar=metavar, help=help, default=argparse.SUPPRESS)

    number, integer = _or_none(float), _or_none(int)
    add("--method", str, "NAME", "blockbatch (default), vanilla, prefix_cache, dual_cache or local_leap")
    add("--gen-length", int, "N", "tokens to generate (256)")
    add("--block-sizes", int_list, "4,8,16", "blockbatch: a branch for each (4 to 128)")
    add("--block-size", int, "N", "other methods: the one block size (32)")
    add("--threshold", number, "P", "confidence that commits a token (0.9)")
    add(
        "--tail-threshold",
        number,
        "P",
        "blockbatch: the same behind a window's first unsure token (as threshold)",
    )
    add("--merge-threshold", number, "P", "blockbatch: confidence to take another branch's token (0.5)")
    add("--sync-threshold", integer, "N", "blockbatch: a branch this far behind the leader follows it (8)")
    add(
        "--refresh-interval", integer, "N", "blockbatch: tokens of finished blocks between full forwards (32)"
    )
    add("--eos-exit", str, "MODE", "prefix or window: stop with the text; none: fill the canvas")
    add("--eos-token-ids", int_list, "1,2", "ids that end the text (the model's)")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the text before this text; repeatable",
        default=argparse.SUPPRESS,
    )
    add(
        "--steps", integer, "N", "vanilla, and the caches with --threshold none: forwards in all (gen-length)"
    )
    add("--commit", str, "RULE", "blockbatch: threshold (default), or local_leap for LocalLeap's rule")
    add("--leap-radius", int, "N", "LocalLeap: distance to a sure token (4)")
    add("--leap-threshold", number, "P", "LocalLeap: confidence that is enough within that distance")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="decode the same prompts by every method",
        description="Decode the same prompts by every method and print what each needed. Baselines run as "
        "published (the canvas is filled) and, marked +eos, with the same end as blockbatch.",
    )
    parser.set_defaults(run=_run_compare)
    add_model(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="take this family of the built-in problems; repeatable",
    )
    prompts.add_argument("--count", type=int, metavar="N", help="problems of each family (2)")
    prompts.add_argument("--seed", type=int, metavar="N", help="draws the problems (0)")
    prompts.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='own problems instead (-: standard input): JSON lines {"prompt": ..., "answer": ...}. A text '
        "is right if the answer stands in it on its own, not inside a longer word or number",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--methods", type=names, metavar="A,B", help="methods to run (all)")
    gen_length = COMPARE_GEN_LENGTH
    decoding.add_argument(
        "--gen-length", type=int, default=gen_length, metavar="N", help=f"tokens to generate ({gen_length})"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--show", action="store_true", help="also print the first prompt and every method's text"
    )
    output.add_argument(
        "--json", metavar="FILE", help="save figures and texts (-: print them instead of the table)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that say which model runs where, and how it is prompted."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="tiny", help="tiny (built in, default), a HuggingFace folder or a hub id"
    )
    group.add_argument(
        "--chat", action="store_true", help="write the prompt as a user's message in the chat format"
    )
    group.add_argument("--device", help="cuda (default where there is a GPU), cuda:1, cpu")
    group.add_argument(
        "--dtype", help="float32 (default on the CPU), bfloat16 (default elsewhere) or float16"
    )
    group.add_argument("--backend", help="reference, triton or cuda; left out: the fastest that runs")


def _run_generate(options: argparse.Namespace) -> None:
    from blockbatch.cli.generate import run

    run(options)


def _run_compare(options: argparse.Namespace) -> None:
    from blockbatch.cli.compare import run

    run(options)


def int_list(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 4,8,16, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


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
