"""The command `blockbatch`; its first argument says what to do.

Exit status: 0; 2 for bad input, said in one line; 130 after Ctrl-C; 141 when nobody reads the output.
Nothing here imports torch before the arguments are read.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from blockbatch.cli import ranks
from blockbatch.cli.parser import build_parser
from blockbatch.cli.suggest import advice
from blockbatch.cli.terminal import escape
from blockbatch.plugins import load_plugin

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# What the package raises for input it cannot use. Anything else is a bug and keeps its traceback.
_INPUT_ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        the exit status; argparse leaves by SystemExit for `--help`, `--version` and unknown options.
    """
    return ranks.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    # A locale that lacks a character shows its code instead of ending the program.
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")
    # Threads that spin while they wait cost a busy machine far more than they save a quiet one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options = build_parser().parse_args(arguments)
        ranks.check(options)
        # For the reports that say what made them.
        given = sys.argv[1:] if arguments is None else arguments
        options.command_line = shlex.join(["blockbatch", *given])
        for plugin in getattr(options, "plugin", ()):
            load_plugin(plugin)
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("blockbatch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more on its way out, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except _INPUT_ERRORS as error:
        if os.environ.get("BLOCKBATCH_TRACEBACK"):
            raise
        message = _message(error)
        print(f"blockbatch: error: {escape(message + advice(message))}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
