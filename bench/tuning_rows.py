"""The tables of `blockbatch_kernels.tuning` from bench/results.

    python bench/tuning_rows.py [--write]

Prints `blockbatch_kernels/tuning/rows.py`, or writes it: for every line of gemm.json (by `bench/gemm.py
--candidates`) and attention.json (by `bench/attention.py`) the fastest way. Among launches of ours those of
the rule for other sizes stay where they come within a hundredth of the fastest, so that a table changes only
where a measurement says so. "cublas" stands where no launch of ours is as fast.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockbatch_kernels import tuning
from blockbatch_kernels.tuning import DeviceKind, LinearPart, LinearTile
from blockbatch_kernels.tuning import rows as tables

RESULTS = Path(__file__).parent / "results"
# Medians of the same kernel lie as far apart from run to run.
SPREAD = 0.03
_TIE = 0.01
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
    return tuning.H100 if found is None else DeviceKind(tuple(found["capability"]), found["num_sms"])


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


def product_rows(report: dict[str, Any]) -> Iterator[tuple[str, int, int, bool, list[tuple[int, str]]]]:
    """The fields of each LinearRow."""
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
                yield f"gemm.json: {model}/{name}", *sizes, gated, choices


def lm_head_rows(report: dict[str, Any]) -> Iterator[tuple[str, int, int, list[tuple[int, int]]]]:
    """The fields of each LmHeadRow."""
    for model, lines in report["models"].items():
        heads = sorted(
            (line for line in lines if line["product"] == "lm_head"), key=lambda line: line["tokens"]
        )
        choices = []
        for line in heads:
            smallest = min((tile for tile in tuning.LM_HEAD_TILES if tile >= line["tokens"]), default=0)
            best = best_of(line["candidates"], str(smallest))
            choices.append((line["tokens"], 0 if best == "cublas" else int(best)))
        if heads:
            yield f"gemm.json: {model}/lm_head", heads[0]["rows"], heads[0]["columns"], choices


def attention_rows(report: dict[str, Any]) -> Iterator[tuple[str, int, int, int, int, int, str]]:
    """The fields of each AttentionRow."""
    for model, lines in report["models"].items():
        for line in lines:
            sizes = (line[name] for name in ("num_heads", "num_kv_heads", "tokens", "keys", "distinct_rows"))
            fastest = min(line["candidates"], key=line["candidates"].get)
            yield f"attention.json: {model}/{line['case']}", *sizes, fastest


def rows_now() -> dict[str, dict[DeviceKind, tuple]]:
    """The tables that bench/results give, by name."""
    gemm, attention = report_of("gemm.json"), report_of("attention.json")

    def table(report: dict[str, Any], row: type, found: Iterator[tuple]) -> dict[DeviceKind, tuple]:
        made = tuple(
            row(*(tuple(field) if isinstance(field, list) else field for field in fields)) for fields in found
        )
        return {kind_of(report): made} if made else {}

    return {
        "PRODUCTS": table(gemm, tables.LinearRow, product_rows(gemm)),
        "LM_HEADS": table(gemm, tables.LmHeadRow, lm_head_rows(gemm)),
        "ATTENTION": table(attention, tables.AttentionRow, attention_rows(attention)),
    }


def source() -> str:
    """The text of rows.py, as the formatter leaves it."""
    types = {"PRODUCTS": "LinearRow", "LM_HEADS": "LmHeadRow", "ATTENTION": "AttentionRow"}
    text = [
        '"""What was measured to be the fastest; written by `python bench/tuning_rows.py --write`."""',
        "",
        "from blockbatch_kernels.tuning.records import AttentionRow, DeviceKind, LinearRow, LmHeadRow",
        "",
    ]
    for name, table in rows_now().items():
        head = f"{name}: dict[DeviceKind, tuple[{types[name]}, ...]] = {{"
        text.append(head if table else head + "}")
        for kind, rows in table.items():
            text.append(f"    DeviceKind({kind.capability}, {kind.num_sms}): (")
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
    if arguments.parse_args().write:
        Path(tables.__file__).write_text(source())
        print(f"written: {tables.__file__}")
    else:
        print(source(), end="")


if __name__ == "__main__":
    main()
