"""Every tile of the products in e4m3, and the table of `blockbatch_kernels.tuning.rows_fp8` that follows.

    python bench/fp8_tiles.py [--of layers] [--shapes llada-8b] [--tokens 16 32 64 128 192 256 512] [--write]

`--of` says which products: those of the `layers`, or that of the LM `head`, whose results stand in a file of
their own; `--write` makes the table from the files of both.
Every way is verified against the reference before it is timed. A call goes over several weights in one CUDA
graph, so that each of them comes from memory. Lines of `gate_up` with `gated` compare the activation in the
product's kernel (and a kernel that quantises its rows) with kernels for each ("apart", on the tile that is
the fastest for the product alone). "library" is `torch._scaled_mm` with a scale for each row. Microseconds
of one product.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_models import SHAPES
from timing import RESULTS, as_graph, clean, device_of, in_turns, parser, write_report
from torch import Tensor
from verify import relative_error

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, tuning
from blockbatch_kernels.cuda import extension, gemm_fp8

TOKENS = (16, 32, 64, 128, 192, 256, 512, 1280)
# A sum rounded to bf16; and steps of e4m3 that such a rounding moves.
MOST_ERROR = {False: 5e-3, True: 2e-2}
# What is measured, and the file of its results.
FILES = {"layers": "fp8_tiles.json", "head": "fp8_tiles_head.json"}
# Predictions whose logits exist at the same time, at most.
MOST_HEAD_TOKENS = 512
TABLE = Path(__file__).parents[1] / "blockbatch_kernels" / "tuning" / "rows_fp8.py"
# Weights of a product that one measurement goes over: more than L2 holds of any GPU.
_WEIGHT_BYTES = 300 << 20
# Of ways that lie closer together the one that was chosen before stays, or the one without a list of its own.
_TIE = 0.01
# A tile that rotates q and k itself saves the kernel that would: it may take so much longer alone.
_ROTATION = 0.05

Line = dict[str, Any]
Way = tuple[tuning.Fp8Tile | None, tuning.Fp8Tile | None]  # with the activation, and of the product alone


def products_of(shape: str, of: str) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of the weights of a layer, or of the LM head."""
    spec = SHAPES[shape]
    if of == "head":
        yield "lm_head", spec.vocab_size, spec.hidden_size
        return
    dim, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    yield "qkv", heads + 2 * spec.num_kv_heads * spec.head_dim, dim
    yield "out", dim, heads
    yield "gate_up", 2 * spec.intermediate_size, dim
    yield "down", dim, spec.intermediate_size


def e4m3(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, columns, device=device)
    return bbk.quantize_rows(values, backend=None if device.type == "cuda" else "reference")


def run_of(way: Way, gated: bool, x: tuple[Tensor, Tensor], weights: list) -> Callable[[], list]:
    operator = bbk.linear_swiglu_fp8 if gated else bbk.linear_fp8
    options = dict(out_dtype=torch.bfloat16, static_weight=True)

    def tile_of(_x: Tensor, _weight: Tensor, _dtype: torch.dtype, activated: bool = False):
        return way[0] if activated else way[1]

    def run() -> list:
        with mock.patch.object(gemm_fp8, "tile_of", tile_of):
            return [operator(*x, *weight, **options) for weight in weights]

    return run


def as_one(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0].float() * result[1][:, None]


def ways_of(tokens: int, rows: int, columns: int, gated: bool, device: torch.device, best: str) -> dict:
    """The ways of a product by name; `best`: that of the product alone."""
    if device.type != "cuda" or not cuda.is_available(device) or extension.code_for(device.index) != "sm90a":
        return {"apart" if gated else "library": (None, None)}
    plain = {tuning.fp8_tile_name(tile): tile for tile in tuning.fp8_candidates(tokens, rows, columns)}
    if not gated:
        return {"library": (None, None), **{name: (None, tile) for name, tile in plain.items()}}
    tiles = tuning.fp8_candidates(tokens, rows // 2, columns, gated=True)
    return {"apart": (None, plain.get(best)), **{tuning.fp8_tile_name(tile): (tile, None) for tile in tiles}}


def measure(
    name: str,
    tokens: int,
    weights: list,
    gated: bool,
    best: str,
    device: torch.device,
    repeats: int,
    skipped: tuple[str, ...] = (),
) -> Line:
    rows, columns = weights[0][0].shape
    x = e4m3(tokens, columns, device)
    if gated:  # gates of about 1
        x = x[0], x[1] * columns**-0.5
    operator = bbk.linear_swiglu_fp8 if gated else bbk.linear_fp8
    want = as_one(operator(*x, *weights[0], out_dtype=torch.bfloat16, backend="reference"))
    line = {"product": name, "tokens": tokens, "out_features": rows // 2 if gated else rows}
    line |= {"in_features": columns, "gated": gated, "failed": {}}
    runs = {}
    for way, tiles in ways_of(tokens, rows, columns, gated, device, best).items():
        if any(word in way.split() for word in skipped):
            continue
        try:
            run = run_of(tiles, gated, x, weights)
            error = relative_error(as_one(run()[0]), want)
            if not error <= MOST_ERROR[gated]:
                raise RuntimeError(f"error {error:.2e}")
            runs[way] = as_graph(run, device)
        except (RuntimeError, ValueError) as caught:
            line["failed"][way] = str(caught)[:200]
    taken = in_turns([(run, None) for run in runs.values()], device, repeats)
    times = {way: 1e3 * ms / len(weights) for way, (ms, _) in zip(runs, taken, strict=True)}
    line["us"] = {way: round(times[way], 2) for way in sorted(times, key=times.get)}
    line["best"] = best_of(line["us"])
    line["tflops"] = round(2e-6 * tokens * rows * columns / line["us"][line["best"]], 1)
    shown = ", ".join(f"{way} {us:.1f}" for way, us in list(line["us"].items())[:7])
    print(f"{name}{' gated' if gated else ''} {tokens}: {shown}", flush=True)
    if line["failed"]:
        print(f"  failed: {line['failed']}", flush=True)
    return line


def best_of(times: dict[str, float]) -> str:
    """The fastest; library or kernels apart where they are as good."""
    fastest = min(times, key=times.get)
    limit = times[fastest] * (1 + _TIE)
    return next((way for way in ("library", "apart") if times.get(way, float("inf")) <= limit), fastest)


def choice_of(line: Line) -> str:
    """The way that the table gets: the fastest, and of q, k and v one that rotates, where little is lost."""
    times = line["us"]
    names = (tuning.fp8_tile_name(tile) for tile in tuning.ROTATED_FP8_TILES)
    rotating = [name for name in names if name in times]
    if line["product"] == "qkv" and rotating:
        best = min(rotating, key=times.get)
        if times[best] <= min(times.values()) * (1 + _ROTATION):
            return best
    return best_of(times)


def rows_of(report: dict[str, Any], file: str = FILES["layers"]) -> list[tuning.Fp8Row]:
    """The rows of the table that a report of this benchmark gives, which stands in `file`."""
    found: dict[tuple, list[tuple[int, str]]] = {}
    for model, lines in report["models"].items():
        for line in lines:
            key = f"{file}: {model}/{line['product']}{'/gated' if line['gated'] else ''}"
            sizes = line["out_features"], line["in_features"], line["gated"]
            found.setdefault((key, *sizes), []).append((line["tokens"], choice_of(line)))
    return [tuning.Fp8Row(*key, tuple(sorted(choices))) for key, choices in found.items()]


def source_of(reports: dict[str, dict[str, Any]]) -> str:
    """The text of rows_fp8.py, as the formatter leaves it, from reports by their files.

    All of them are of one kind of device.
    """
    kinds = {
        tuning.DeviceKind(tuple(one["device_kind"]["capability"]), one["device_kind"]["num_sms"])
        for one in reports.values()
    }
    if len(kinds) != 1:
        raise RuntimeError(f"{', '.join(reports)}: expected results of one kind of device, got {kinds}")
    (kind,) = kinds
    text = [
        '"""The fastest tiles of products in e4m3, by `python bench/fp8_tiles.py --write`."""',
        "",
        "from blockbatch_kernels.tuning.records import DeviceKind, Fp8Row",
        "",
        "PRODUCTS: dict[DeviceKind, tuple[Fp8Row, ...]] = {",
        f"    DeviceKind({kind.capability}, {kind.num_sms}): (",
    ]
    for row in (row for file, report in reports.items() for row in rows_of(report, file)):
        text += [" " * 8 + "Fp8Row(", f'{" " * 12}result="{row.result}",']
        sizes = ("out_features", "in_features", "gated")
        text += [f"{' ' * 12}{name}={getattr(row, name)}," for name in sizes]
        text += [" " * 12 + "choices=("]
        text += [f'{" " * 16}({tokens}, "{name}"),' for tokens, name in row.choices]
        text += [" " * 12 + "),", " " * 8 + "),"]
    return "\n".join([*text, "    ),", "}"]) + "\n"


def stored_reports(**written: Path) -> dict[str, dict[str, Any]]:
    """The reports that are there, by their files, those of the layers first.

    written: where the one of `layers` or `head` is, if not among the results.
    """
    paths = {name: written.get(of, RESULTS / name) for of, name in FILES.items()}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "fp8_tiles", ["llada-8b"])
    arguments.add_argument("--of", default="layers", choices=FILES, help="whose products")
    arguments.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--skip", nargs="*", default=[], help="words of names of ways to leave out")
    arguments.add_argument("--write", action="store_true", help="write rows_fp8.py from the reports")
    arguments.set_defaults(out=None)
    options = arguments.parse_args()
    options.out = options.out or RESULTS / FILES[options.of]
    device, repeats = device_of(options), 3 if options.quick else options.repeats
    models: dict[str, list[Line]] = {}
    for shape in options.shapes:
        lines = models[shape] = []
        for name, rows, columns in products_of(shape, options.of):
            count = max(2, _WEIGHT_BYTES // (rows * columns)) if device.type == "cuda" else 1
            weights = [e4m3(rows, columns, device) for _ in range(count)]
            most = MOST_HEAD_TOKENS if options.of == "head" else max(options.tokens)
            for tokens in (tokens for tokens in options.tokens if tokens <= most):
                of_all = device, repeats, tuple(options.skip)
                line = measure(name, tokens, weights, False, "", *of_all)
                lines.append(line)
                if name == "gate_up":
                    lines.append(measure(name, tokens, weights, True, line["best"], *of_all))
            del weights
            clean(device)
    kind = tuning.device_kind(device)._asdict()
    write_report(options, device, device_kind=kind, models=models)
    if options.write:
        TABLE.write_text(source_of(stored_reports(**{options.of: options.out})))
        print(f"written: {TABLE}")


if __name__ == "__main__":
    main()
