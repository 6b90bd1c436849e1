"""`blockbatch picture KIND`: PNG files and pages made of saved traces."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blockbatch.cli.files import check_output
from blockbatch.cli.help import examples

Trace = dict[str, Any]


class Source(NamedTuple):
    """A trace file and what is in it."""

    path: Path
    trace: Trace


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`; every kind of picture has a parser of its own."""
    parser = commands.add_parser(
        "picture",
        help="draw saved traces",
        description="Draw what decodes did, from traces that `blockbatch generate --trace FILE` saved.",
        epilog=examples(
            'blockbatch generate "PROMPT" --gen-length 128 --trace trace.json',
            "blockbatch picture replay trace.json",
            "blockbatch picture consensus trace.json",
        ),
    )
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    _add_replay(kinds)
    _add_consensus(kinds)
    _add_frontier(kinds)
    _add_trajectories(kinds)
    _add_agreement(kinds)


def _add_replay(kinds: Any) -> None:
    parser = add_kind(
        kinds,
        "replay",
        "a page that plays a decode step by step",
        "A page that plays a decode: the canvas of every branch after every forward, with commits, merges, "
        "syncs and refreshes. One HTML file that needs no network. Several traces, or a folder of them, "
        "become a page each. The page opens at the forward where branches first differ, or first merge, "
        "sync or adopt a draft; #forward=N behind its address opens another one.",
        "blockbatch picture replay trace.json",
        "blockbatch picture replay traces --out pages",
    )
    parser.set_defaults(run=_run_replay)


def _add_consensus(kinds: Any) -> None:
    parser = add_kind(
        kinds,
        "consensus",
        "a heat map of which branches agree at each position",
        "A heat map over positions and forwards: how many branches hold the same token, and where two hold "
        "different ones. PNG. Several traces, or a folder of them, become a picture each.",
        "blockbatch picture consensus trace.json",
        "blockbatch picture consensus trace.json --whole --out consensus.png",
    )
    parser.add_argument("--whole", action="store_true", help="all positions, also those behind all text")
    parser.set_defaults(run=_run_consensus)


def _add_frontier(kinds: Any) -> None:
    parser = kinds.add_parser(
        "frontier",
        help="accuracy against forwards",
        description="Accuracy against forwards of fixed block sizes, of BlockBatch, and of an oracle that "
        "picks the best fixed size for each problem, with 95% intervals. PNG, from the results of "
        "`blockbatch eval --methods blockbatch,fixed-blocks`.",
        epilog=examples(
            "blockbatch eval --methods blockbatch,fixed-blocks --out sizes",
            "blockbatch picture frontier sizes/results.jsonl",
        ),
    )
    parser.add_argument("results", metavar="RESULTS", help="results.jsonl of an evaluation")
    parser.add_argument("--out", metavar="FILE", help="PNG to write (left out: frontier.png beside RESULTS)")
    parser.set_defaults(run=_run_frontier)


def _add_trajectories(kinds: Any) -> None:
    parser = _add_joint_kind(
        kinds,
        "trajectories",
        "where the K/V cache of each branch goes",
        "The paths of the branches' K/V states around their common start, the prompt with an empty canvas, "
        "with the jumps of refreshes and syncs. One PNG from traces of one prompt that `blockbatch generate "
        "--trace FILE --trace-kv` saved, such as one of BlockBatch and one of each block size alone.",
        'blockbatch generate "PROMPT" --trace all.json --trace-kv',
        'blockbatch generate "PROMPT" --method dual_cache --trace one.json --trace-kv',
        "blockbatch picture trajectories all.json one.json",
    )
    parser.set_defaults(run=_run_trajectories)


def _add_agreement(kinds: Any) -> None:
    parser = _add_joint_kind(
        kinds,
        "agreement",
        "on which kinds of tokens branches agree",
        "How often and when branches decide on the same token, and how they came to their tokens, for "
        "digits, words, punctuation, whitespace and keywords. One PNG from many traces, such as those of "
        "`blockbatch eval --traces FOLDER`; decodes with a single block size do not count.",
        "blockbatch eval --methods blockbatch --traces traces",
        "blockbatch picture agreement traces --setting blockbatch",
    )
    parser.add_argument("--setting", metavar="LABEL", help="only traces of this setting of the evaluation")
    parser.set_defaults(run=_run_agreement)


def _add_joint_kind(
    kinds: Any, name: str, help: str, description: str, *commands: str
) -> argparse.ArgumentParser:
    """A parser of a kind of picture that shows all traces in one; `commands` are its examples."""
    parser = kinds.add_parser(name, help=help, description=description, epilog=examples(*commands))
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="trace file, or a folder with *.json")
    parser.add_argument(
        "--out", metavar="FILE", help=f"PNG to write (left out: one named {name} beside the first trace)"
    )
    return parser


def add_kind(kinds: Any, name: str, help: str, description: str, *commands: str) -> argparse.ArgumentParser:
    """A parser of one kind of picture, with `traces` and `out`; `commands` are its examples."""
    parser = kinds.add_parser(name, help=help, description=description, epilog=examples(*commands))
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="trace file, or a folder with *.json")
    parser.add_argument(
        "--out", metavar="PATH", help="file to write; a folder for several (left out: beside the traces)"
    )
    return parser


def _run_replay(options: argparse.Namespace) -> None:
    from blockbatch.pictures import replay

    _draw_each(options, ".replay.html", lambda trace, path: replay.draw(trace, path))


def _run_consensus(options: argparse.Namespace) -> None:
    from blockbatch.pictures import consensus

    _draw_each(
        options, ".consensus.png", lambda trace, path: consensus.draw(trace, path, whole=options.whole)
    )


def _run_frontier(options: argparse.Namespace) -> None:
    from blockbatch.evaluation.records import read_run
    from blockbatch.pictures import frontier

    target = _target(options.out, Path(options.results).with_name("frontier.png"))
    run = read_run(options.results)
    try:
        frontier.draw(run, target)
    except ValueError as error:
        raise ValueError(f"{options.results}: {error}") from None
    print(target)


def _run_trajectories(options: argparse.Namespace) -> None:
    from blockbatch.pictures import trajectories

    sources = read_traces(options.traces)
    first = sources[0].path
    target = _target(options.out, first.with_name(f"{first.stem}.trajectories.png"))
    for source in sources:
        try:
            trajectories.trajectories(source.trace)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
    trajectories.draw([source.trace for source in sources], target)
    print(target)


def _run_agreement(options: argparse.Namespace) -> None:
    from blockbatch.pictures import agreement

    sources = read_traces(options.traces)
    if options.setting is not None:
        labels = dict.fromkeys(str(source.trace.get("setting", "(none)")) for source in sources)
        sources = [source for source in sources if source.trace.get("setting") == options.setting]
        if not sources:
            raise ValueError(
                f"--setting: expected one of the traces', {', '.join(labels)}, got {options.setting}"
            )
    target = _target(options.out, sources[0].path.with_name("agreement.png"))
    agreement.draw([source.trace for source in sources], target)
    print(target)


def _target(out: str | None, default: Path) -> Path:
    """Where the one picture of several sources goes, checked before any work."""
    target = default if out is None else Path(out)
    if target.suffix.lower() != ".png":
        raise ValueError(f"--out: expected a name that ends in .png, got {out}")
    check_output(str(target), "--out")
    return target


def _draw_each(options: argparse.Namespace, ending: str, draw: Callable[[Trace, Path], Any]) -> None:
    """One picture for each trace; all traces are read and checked before the first is drawn."""
    sources = read_traces(options.traces)
    for source, target in zip(sources, _targets(sources, options.out, ending), strict=True):
        try:
            draw(source.trace, target)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
        print(target)


def read_traces(paths: Sequence[str]) -> list[Source]:
    """The traces in files and folders, in the order given, those of a folder by name.

    Raises:
        ValueError: a file is not a trace, or a folder holds none.
        OSError: one cannot be read.
    """
    from blockbatch.tracing import load_trace

    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"TRACE: expected a folder with *.json files, got {path} without any")
        files += found
    return [Source(path, load_trace(path)) for path in files]


def _targets(sources: Sequence[Source], out: str | None, ending: str) -> list[Path]:
    """Where each picture goes: TRACE.json becomes TRACE and `ending`, unless --out names a file."""
    if out is not None and len(sources) == 1 and not Path(out).is_dir():
        suffix = Path(ending).suffix
        if Path(out).suffix.lower() != suffix:
            raise ValueError(f"--out: expected a name that ends in {suffix}, got {out}")
        check_output(out, "--out")
        return [Path(out)]
    if out is not None and not Path(out).is_dir():
        raise NotADirectoryError(f"--out: expected an existing folder for {len(sources)} pictures, got {out}")
    targets = [
        (source.path.parent if out is None else Path(out)) / f"{source.path.stem}{ending}"
        for source in sources
    ]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            raise ValueError(f"TRACE: expected files of different names, got two for {target}")
        check_output(str(target), "--out" if out is not None else "TRACE")
    return targets
