"""The tables of `blockbatch_kernels.tuning` from bench/results.

    python bench/tuning_rows.py [--write]

Prints `rows.py` and `rows_attention.py` of `blockbatch_kernels/tuning`, or writes them: for every line of
gemm.json and gemm_h200.json (by `bench/gemm.py --candidates`, of a kind of device each) and attention.json
(by `bench/attention.py`) the fastest way. Among launches of ours those of the rule for other sizes stay where
they come within a hundredth of the fastest, so that a table changes only where a measurement says so.
"cublas" stands where no launch of ours is as fast.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blockbatch_kernels import tuning
from blockbatch_kernels.tuning import DeviceKind, LinearPart, LinearTile, records

RESULTS = Path(__file__).parent / "results"
# Medians of the same kernel lie as far apart from run to run.
SPREAD = 0.03
_TIE = 0.01
GEMM_FILES = ("gemm.json", "gemm_h200.json")  # of a kind of device each
_FILES = {"rows.py": ("PRODUCTS", "LM_HEADS"), "rows_attention.py": ("ATTENTION",)}
_PRODUCTS = ("qkv", "out", "gate_up", "down")
_WIDTH = 110

Line = dict[str, Any]


def report_of(name: str) -> dict[str, Any]:
    """A file of bench/results; without `models` where there is none."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else {"models": {}}


def kind_of(report: dict[str, Any]) -> DeviceKind:
    """The kind of the device that was measured."""
    found = report.get("device_kind")
    if found is None:
        return tuning.H100
    return DeviceKind(**found | {"capability": tuple(found["capability"])})


def line_of(result: str) -> Line:
    """The line that a row's `result` names, such as "gemm.json: llada-8b/qkv/252"; raises KeyError."""
    file, key = result.split(": ", 1)
    model, rest = key.split("/", 1)
    for line in report_of(file)["models"].get(model, ()):
        if rest == (line["case"] if "case" in line else f"{line['product']}/{line['tokens']}"):
            return line
    raise KeyError(result)


def times_of(line: Line) -> dict[str, float] | None:
    """Microseconds of every way that was measured; None where the line compares none that are alike."""
    if "candidates" in line:
        return line["candidates"]
    if not line.get("parts"):
        return None
    parts = tuple(
        LinearPart(
            part["features"],
            LinearTile(
                part["tokens"],
                part["rows"],
                part.get("split_k", part.get("splits")),
                part.get("multicast", part.get("shares")),
            ),
        )
        for part in line["parts"]
    )
    # cuBLAS's time lacks what the operator adds behind these two.
    if line["product"] in ("qkv", "gate_up") and line["ours_us"] > line["cublas_us"]:
        return None
    return {"cublas": line["cublas_us"], tuning.name_of(parts): line["ours_us"]}


def best_of(times: dict[str, float], usual: str) -> str:
    """The fastest way; the usual one of ours where it is as good as that."""
    fastest = min(times, key=times.get)
    limit = min(times["cublas"], times[fastest] * (1 + _TIE))
    return usual if fastest != "cublas" and times.get(usual, float("inf")) <= limit else fastest


def product_rows(file: str) -> Iterator[tuple[str, int, int, bool, list[tuple[int, str]]]]:
    """The fields of each LinearRow."""
    report = report_of(file)
    for model, lines in report["models"].items():
        for name in _PRODUCTS:
            gated, choices, sizes = name == "gate_up", [], None
            for line in sorted(lines, key=lambda line: line["tokens"]):
                times = times_of(line) if line["product"] == name else None
                if times is None:
                    continue
                sizes = line["rows"] // (2 if gated else 1), line["columns"]
                rule = tuning.linear_rule(line["tokens"], *sizes, gated=gated, device_kind=kind_of(report))
                choices.append((line["tokens"], best_of(times, tuning.name_of(rule))))
            if choices:
                yield f"{file}: {model}/{name}", *sizes, gated, choices


def lm_head_rows(file: str) -> Iterator[tuple[str, int, int, list[tuple[int, int]]]]:
    """The fields of each LmHeadRow."""
    for model, lines in report_of(file)["models"].items():
        heads = sorted(
            (line for line in lines if line["product"] == "lm_head"), key=lambda line: line["tokens"]
        )
        choices = []
        for line in heads:
            smallest = min((tile for tile in tuning.LM_HEAD_TILES if tile >= line["tokens"]), default=0)
            best = best_of(line["candidates"], str(smallest))
            choices.append((line["tokens"], 0 if best == "cublas" else int(best)))
        if heads:
            yield f"{file}: {model}/lm_head", heads[0]["rows"], heads[0]["columns"], choices


def attention_rows(file: str) -> Iterator[tuple[str, int, int, int, int, int, str]]:
    """The fields of each AttentionRow."""
    for model, lines in report_of(file)["models"].items():
        for line in lines:
            sizes = (line[name] for name in ("num_heads", "num_kv_heads", "tokens", "keys", "distinct_rows"))
            fastest = min(line["candidates"], key=line["candidates"].get)
            yield f"{file}: {model}/{line['case']}", *sizes, fastest


def rows_now() -> dict[str, dict[DeviceKind, tuple]]:
    """The tables that bench/results give, by name."""

    def table(row: type, rows_of: Callable[[str], Iterator[tuple]], *files: str) -> dict[DeviceKind, tuple]:
        made: dict[DeviceKind, tuple] = {}
        for file in files:
            found = tuple(
                row(*(tuple(field) if isinstance(field, list) else field for field in fields))
                for fields in rows_of(file)
            )
            kind = kind_of(report_of(file))
            if found and kind in made:
                raise ValueError(f"{file}: expected results of another device than {kind}")
            made |= {kind: found} if found else {}
        return made

    return {
        "PRODUCTS": table(records.LinearRow, product_rows, *GEMM_FILES),
        "LM_HEADS": table(records.LmHeadRow, lm_head_rows, *GEMM_FILES),
        "ATTENTION": table(records.AttentionRow, attention_rows, "attention.json"),
    }


def sources() -> dict[str, str]:
    """The texts of the files, as the formatter leaves them."""
    return {file: _source(names) for file, names in _FILES.items()}


def _source(names: tuple[str, ...]) -> str:
    types = {"PRODUCTS": "LinearRow", "LM_HEADS": "LmHeadRow", "ATTENTION": "AttentionRow"}
    imported = ", ".join(sorted(["DeviceKind", *(types[name] for name in names)]))
    text = [
        '"""What was measured to be the fastest; written by `python bench/tuning_rows.py --write`."""',
        "",
        f"from blockbatch_kernels.tuning.records import {imported}",
        "",
    ]
    found = rows_now()
    for name in names:
        table = found[name]
        head = f"{name}: dict[DeviceKind, tuple[{types[name]}, ...]] = {{"
        text.append(head if table else head + "}")
        for kind, rows in table.items():
            memory = ", large_memory=True" if kind.large_memory else ""
            text.append(f"    DeviceKind({kind.capability}, {kind.num_sms}{memory}): (")
            for row in rows:
                text += _row_lines(row)
            text.append("    ),")
        if table:
            text.append("}")
    return "\n".join(text) + "\n"


def _row_lines(row: tuple) -> list[str]:
    indent, name = " " * 8, type(row).__name__
    if name == "AttentionRow":
        fields = [_quoted(field) for field in row]
        joined = ", ".join(fields)
        if len(f"{indent}{name}({joined}),") <= _WIDTH:
            return [f"{indent}{name}({joined}),"]
        inner = [joined] if len(indent) + 4 + len(joined) <= _WIDTH else [f"{field}," for field in fields]
        return [f"{indent}{name}(", *(f"{indent}    {text}" for text in inner), f"{indent}),"]
    *sizes, choices = row._asdict().items()
    return [
        f"{indent}{name}(",
        *(f"{indent}    {field}={_quoted(value)}," for field, value in sizes),
        f"{indent}    choices=(",
        *(f"{indent}        ({count}, {_quoted(choice)})," for count, choice in choices[1]),
        f"{indent}    ),",
        f"{indent}),",
    ]


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true", help="into the package instead of on the screen")
    write = arguments.parse_args().write
    for file, text in sources().items():
        path = Path(records.__file__).parent / file
        if write:
            path.write_text(text)
        print(f"written: {path}" if write else text)


if __name__ == "__main__":
    main()
