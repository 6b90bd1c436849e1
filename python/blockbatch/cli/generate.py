"""`blockbatch generate`: decode one prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockbatch.cli import canvas, ranks
from blockbatch.cli.arguments import (
    add_decoding,
    add_model,
    add_thinking,
    check_bos,
    decode_config,
    encode_text,
    int_list,
    load,
    methods_note,
)
from blockbatch.cli.files import check_output, read_text
from blockbatch.cli.help import examples
from blockbatch.cli.terminal import Screen, Span, escape, paint, wants_live
from blockbatch.cli.words import why_empty
from blockbatch.config import DecodeConfig, decode_settings
from blockbatch.tracing import open_recorder, save_trace, trace_header

if TYPE_CHECKING:
    from blockbatch.models import Model
    from blockbatch.result import Result

# Seconds between two frames: often enough to look alive, seldom enough to cost little.
_FRAME_INTERVAL = 0.05


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "generate",
        help="decode one prompt",
        description="Decode one prompt. A terminal shows the text while it denoises; elsewhere only "
        "the text is written.",
        epilog=methods_note()
        + "\n\n"
        + examples(
            'blockbatch generate "Divide with remainder until zero: 51 and 16."',
            'echo "Divide with remainder until zero: 84 and 36." | blockbatch generate -',
            "blockbatch generate --prompt-file prompt.txt --preset fast --json",
            'blockbatch generate "PROMPT" --method dual_cache --threshold 0.95',
            'blockbatch generate "PROMPT" --query-span open --refresh-interval none',
            'blockbatch generate "PROMPT" --gen-length 128 --trace trace.json',
            'blockbatch generate "PROMPT" --model GSAI-ML/LLaDA-8B-Instruct --chat',
        ),
    )
    parser.set_defaults(run=run)
    parser.stray = "a prompt of several words stands in quotes"
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt; -: standard input")
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with the prompt (-: standard input); its last newline is left out",
    )
    group.add_argument("--prompt-ids", type=int_list, metavar="1,2,3", help="the prompt as token ids")
    add_model(parser)
    add_thinking(parser)
    add_decoding(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    output.add_argument("--trace", metavar="FILE", help="save what every forward did, as JSON")
    output.add_argument(
        "--trace-kv", action="store_true", help="the trace also holds where the K/V cache of each branch goes"
    )
    output.add_argument("--no-live", action="store_true", help="a terminal, too, gets the text alone")


def run(options: argparse.Namespace) -> None:
    """Decodes and writes as the options say."""
    from blockbatch import generation

    if options.trace_kv and options.trace is None:
        raise ValueError("--trace-kv: expected only together with --trace, got it alone")
    config = decode_config(options, trace=options.trace is not None, trace_kv=options.trace_kv)
    if options.trace is not None:
        check_output(options.trace, "--trace")
    text = _prompt_text(options)
    model = load(options)
    config = config.for_model(model.spec)
    ids = list(options.prompt_ids) if text is None else _encode(model, text, options)
    if model.device.type == "cuda":
        _tell_memory(model, ids, config)
    live = wants_live(sys.stdout) and not options.json and not options.no_live
    if live:
        result = _decode_live(model, ids, config)
    else:
        (result,) = generation.decode(model, [ids], config, ["prompt"])
    if options.trace is not None and ranks.writes():
        save_trace(options.trace, result.trace, **trace_header(model, ids, config, result))
    if options.json:
        print(json.dumps(_report(config, result)))
        return
    text = _text(result)
    # A file or another program gets the text as it is; a terminal must not obey it.
    print(escape(text) if sys.stdout.isatty() else text, end="" if text.endswith("\n") else "\n")
    empty = why_empty(model, result)
    if empty is not None:
        print(f"blockbatch: {empty}", file=sys.stderr)
    if live:
        print(paint(Span("dim", _summary(config, result))))


def _tell_memory(model: Model, ids: list[int], config: DecodeConfig) -> None:
    """What the decode will take of the GPU's memory, on standard error."""
    from blockbatch import memory

    free = memory.free_bytes(model) / 2**20
    needed = memory.needs(model, config, 1, len(ids))
    print(f"{model.device}: {needed}; {free:,.0f} MiB free beside the weights", file=sys.stderr)


def _prompt_text(options: argparse.Namespace) -> str | None:
    check_bos(options)
    if options.prompt_ids is not None:
        for name in ("chat", "bos"):
            if getattr(options, name):
                raise ValueError(f"--{name}: expected a prompt as text, got --prompt-ids")
        return None
    if options.prompt_file is not None:
        return read_text(options.prompt_file, "--prompt-file").removesuffix("\n")
    if options.text == "-":
        return read_text("-", "PROMPT").removesuffix("\n")
    name, text = ("--prompt", options.prompt) if options.text is None else ("PROMPT", options.text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected UTF-8 text, got {text!r:.80}") from None
    return text


def _encode(model: Model, text: str, options: argparse.Namespace) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("--prompt: expected --prompt-ids, since the model has no tokenizer; got text")
    return encode_text(model, text, options, "prompt")


def _decode_live(model: Model, ids: list[int], config: DecodeConfig) -> Result:
    """Decodes with the canvas drawn on standard output, and takes the drawing away again."""
    from blockbatch import generation

    session = generation.open_session(model, ids, config)
    recorder = open_recorder(session, config)
    pieces, glyphs = canvas.token_pieces(model.tokenizer), _glyphs()
    title = f"{config.method}{glyphs.dot}{escape(model.name)}"
    started, drawn = time.perf_counter(), float("-inf")
    with Screen(sys.stdout) as screen:
        while True:
            now = time.perf_counter()
            if now - drawn >= _FRAME_INTERVAL:
                columns, rows = screen.size
                view = canvas.read_view(session)
                screen.draw(canvas.frame(view, pieces, glyphs, title, now - started, columns, rows))
                drawn = now
            step = session.step()
            if step is None:
                break
            if recorder:
                recorder.add(step)
        screen.erase()
    return generation.build_result(model, session, 0, recorder.traces[0] if recorder else None)


def _glyphs() -> canvas.Glyphs:
    try:
        "".join(canvas.UNICODE).encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return canvas.ASCII
    return canvas.UNICODE


def _text(result: Result) -> str:
    """The text; the token ids where the model has no tokenizer."""
    return " ".join(map(str, result.tokens)) if result.text is None else result.text


def _summary(config: DecodeConfig, result: Result) -> str:
    nfe, count = result.nfe, len(result.tokens)
    dot = _glyphs().dot
    parts = (
        config.method,
        f"{count} tokens in {result.seconds:.2f} s ({count / result.seconds:.0f} tokens/s)",
        f"NFE {nfe.total} = " + " + ".join(f"{count} {kind}" for kind, count in asdict(nfe).items()),
        *([f"{result.adopted} adopted from drafts"] if config.drafts else []),
        f"block {result.block_size} won" if len(result.branches) > 1 else f"block {result.block_size}",
        f"stop: {result.stop_reason}",
    )
    return dot.join(parts)


def _report(config: DecodeConfig, result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": result.tokens,
        "nfe": {**asdict(result.nfe), "total": result.nfe.total},
        "adopted": result.adopted,
        "prefix_tokens": result.prefix_tokens,
        "stop_reason": result.stop_reason,
        "block_size": result.block_size,
        "branches": [asdict(branch) for branch in result.branches],
        "seconds": result.seconds,
        "tokens_per_second": len(result.tokens) / result.seconds,
        "method": config.method,
        "settings": decode_settings(config),
    }
