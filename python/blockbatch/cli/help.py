"""Parsers whose help ends in examples, and which name what a mistyped word was meant to be."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NoReturn

from blockbatch.cli.suggest import advice, close

_INVALID_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")


def examples(*commands: str) -> str:
    """Commands to copy, for the end of a help text."""
    return "\n".join(["Examples:", *(f"    {command}" for command in commands)])


def rows(title: str, entries: Mapping[str, str]) -> str:
    """Names with what they are, a line each, for a help text."""
    width = max(map(len, entries))
    return "\n".join([f"{title}:", *(f"  {name:{width}}  {text}" for name, text in entries.items())])


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs, keeps what `examples` and `rows` have laid out."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for laid_out, group in groupby(text.split("\n"), lambda line: line[:2] in ("", "  ")):
            if laid_out:
                for line in group:
                    lines += self._laid_out(line, width)
            else:
                lines += textwrap.wrap(" ".join(" ".join(group).split()), width)
        return "\n".join(indent + line for line in lines)

    def _laid_out(self, line: str, width: int) -> list[str]:
        row = re.match(r"  \S+ +", line)
        if line.startswith("    ") or row is None:
            return [line]
        # The width of a row is that of its name and the gap behind it.
        return textwrap.wrap(line, width, subsequent_indent=" " * row.end()) or [line]


class Parser(argparse.ArgumentParser):
    """
    Attributes:
        stray: what to say where words are left over that are no options.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})
        self.stray = ""
        self._given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, left_over = self.parse_known_args(args, namespace)
        if left_over:
            getattr(options, "parser", self)._refuse(left_over)
        return options

    def error(self, message: str) -> NoReturn:
        # An unknown option is the cause of whatever else does not fit.
        if unknown := list(self._unknown_options()):
            self._refuse(unknown)
        if found := _INVALID_CHOICE.search(message):
            argument, got, choices = found.groups()
            choices = choices.replace("'", "")
            message = f"{argument}: expected one of {choices}, got {got!r}"
        self._leave(message + advice(message))

    def _refuse(self, left_over: Sequence[str]) -> NoReturn:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        message, meant = f"unrecognized arguments: {' '.join(left_over)}", []
        for word in left_over:
            name = word.split("=")[0]
            if not name.startswith("-"):
                continue
            long = f"--{name.lstrip('-')}"
            option = long if long in known else close(long, known)
            if option and option != name:
                meant.append(option)
        if meant:
            message += f"; did you mean {', '.join(dict.fromkeys(meant))}?"
        elif self.stray and not any(word.startswith("-") for word in left_over):
            message += f"; {self.stray}"
        self._leave(message)

    def _leave(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"blockbatch: error: {message}\n")

    def _unknown_options(self) -> Iterator[str]:
        commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for word in self._given:
            if word == "--":
                return
            if not re.match(r"--?[A-Za-z]", word) or " " in word:
                if commands and not word.startswith("-"):
                    return  # the rest is for the command
                continue
            name = word.split("=")[0]
            # What is glued to a short option is its value.
            if name not in self._option_string_actions and name[:2] not in self._option_string_actions:
                yield name


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of single commands below a parser; itself if it has none."""
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in commands:
        for command in action.choices.values():
            yield from leaves(command)
    if not commands:
        yield parser
