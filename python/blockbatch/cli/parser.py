"""The parser of the command line: all commands put together."""

from __future__ import annotations

import argparse
from typing import Any

from blockbatch.cli import ablate, compare, dynamo, evaluate, fill, generate, pictures, serve
from blockbatch.cli.help import Parser, examples, leaves
from blockbatch.cli.version import version

# In the order of the help.
COMMANDS = (generate, fill, compare, evaluate, ablate, pictures, serve, dynamo)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"blockbatch {version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser; its result has a function `run` that takes it, and the command's own `parser`."""
    parser = Parser(
        prog="blockbatch",
        description="Fast decoding of masked diffusion language models (LLaDA, Dream). "
        "`blockbatch COMMAND --help` tells what a command takes.",
        epilog="BLOCKBATCH_TRACEBACK=1 in the environment shows where an error came from.\n\n"
        + examples(
            'blockbatch generate "Divide with remainder until zero: 51 and 16."',
            "blockbatch compare",
            "blockbatch eval --limit 4 --run-code",
        ),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for leaf in leaves(parser):
        leaf.set_defaults(parser=leaf)
    return parser
