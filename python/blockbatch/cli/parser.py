"""The parser of the command line: all commands put together."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from blockbatch.cli import ablate, compare, evaluate, generate, pictures

# In the order of the help.
COMMANDS = (generate, compare, evaluate, ablate, pictures)


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
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
