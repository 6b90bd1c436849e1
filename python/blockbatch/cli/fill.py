"""`blockbatch fill`: decode the gaps of one text."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockbatch.cli.arguments import add_decoding, add_model, decode_config, int_list, load, methods_note
from blockbatch.cli.files import check_output, read_text
from blockbatch.cli.help import examples
from blockbatch.cli.terminal import escape
from blockbatch.config import decode_settings
from blockbatch.tracing import save_trace, trace_header

if TYPE_CHECKING:
    from blockbatch.config import DecodeConfig
    from blockbatch.infill import GappedText
    from blockbatch.models import Model
    from blockbatch.result import FillResult


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "fill",
        help="decode gaps inside a text",
        description="Decode gaps inside a text; what is given stands, also behind a gap. {8} is a gap of 8 "
        "tokens, {{ and }} are braces. The whole text is written. Gaps are decoded to their end: --eos-exit "
        "does not count, and of --gen-length only its ratio to --steps.",
        epilog=methods_note()
        + "\n\n"
        + examples(
            'blockbatch fill "coins: 4*8={2}, total: 16+32={2}"',
            'echo "3*16=48, 51-48={1}" | blockbatch fill -',
            "blockbatch fill --text-file program.txt --preset fast --json",
            "blockbatch fill --ids 19,9,23,28,1415,1415 --method dual_cache",
        ),
    )
    parser.set_defaults(run=run)
    parser.stray = "a text of several words stands in quotes"
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("text", nargs="?", metavar="TEXT", help="the text with gaps; -: standard input")
    group.add_argument("--text-file", metavar="FILE", help="file with the text (-: standard input)")
    group.add_argument("--ids", type=int_list, metavar="1,2,3", help="the text as token ids, MASK in gaps")
    add_model(parser)
    add_decoding(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    output.add_argument("--trace", metavar="FILE", help="save what every forward did, as JSON")


def run(options: argparse.Namespace) -> None:
    """Decodes and writes as the options say."""
    from blockbatch import infill

    if options.chat:
        raise ValueError("--chat: expected a text as it is, which a chat format would end, got --chat")
    if options.bos and options.ids is not None:
        raise ValueError("--bos: expected a text, got --ids")
    config = decode_config(options, trace=options.trace is not None)
    if options.trace is not None:
        check_output(options.trace, "--trace")
    given = _given(options)
    model = load(options)
    config = config.for_model(model.spec)
    text = _encode(model, given, options)
    (result,) = infill.decode(model, [text], config, ["text"])
    if options.trace is not None:
        start = result.gaps[0].start
        save_trace(options.trace, result.trace, **trace_header(model, text.ids[:start], config, result))
    if options.json:
        print(json.dumps(_report(config, result)))
        return
    whole = " ".join(map(str, result.tokens)) if result.text is None else result.text
    # A file or another program gets the text as it is; a terminal must not obey it.
    print(escape(whole) if sys.stdout.isatty() else whole, end="" if whole.endswith("\n") else "\n")


def _given(options: argparse.Namespace) -> str | None:
    if options.ids is not None:
        return None
    if options.text_file is not None:
        return read_text(options.text_file, "--text-file")
    return read_text("-", "TEXT") if options.text == "-" else options.text


def _encode(model: Model, given: str | None, options: argparse.Namespace) -> GappedText:
    from blockbatch import infill

    if given is None:
        return infill.GappedText(list(options.ids), {})
    return infill.read_text(model, given, "text", add_bos=True if options.bos else None)


def _report(config: DecodeConfig, result: FillResult) -> dict[str, Any]:
    settings = decode_settings(config) | {"eos_exit": "none"}
    del settings["gen_length"]
    decoded = sum(len(gap.tokens) for gap in result.gaps)
    return {
        "text": result.text,
        "tokens": result.tokens,
        "gaps": [asdict(gap) for gap in result.gaps],
        "nfe": {**asdict(result.nfe), "total": result.nfe.total},
        "adopted": result.adopted,
        "stop_reason": result.stop_reason,
        "block_size": result.block_size,
        "branches": [asdict(branch) for branch in result.branches],
        "seconds": result.seconds,
        "tokens_per_second": decoded / result.seconds,
        "method": config.method,
        "settings": settings,
    }
