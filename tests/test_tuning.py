"""Every choice of `blockbatch_kernels.tuning` against the result in bench/results that it names."""

import re
import sys
from pathlib import Path

import pytest
import torch

from blockbatch_kernels import tuning
from blockbatch_kernels.tuning import backends, records, rows, rows_attention

ROOT = Path(__file__).resolve().parent.parent
H100_PCIE = tuning.DeviceKind((9, 0), 114)
NOT_MEASURED = {tuning.H100: "256x64 split_k 2", tuning.H200: "256x64 multicast 2"}
PRODUCTS = [
    pytest.param(kind, row, count, choice, id=f"{row.result}/{count}")
    for kind, found in rows.PRODUCTS.items()
    for row in found
    for count, choice in row.choices
]


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tuning_rows

    yield tuning_rows
    sys.modules.pop("tuning_rows")


@pytest.mark.parametrize("kind, row, count, choice", PRODUCTS)
def test_a_product_takes_the_fastest_way(results, kind, row, count, choice):
    line = results.line_of(f"{row.result}/{count}")
    assert (line["rows"], line["columns"]) == (row.out_features * (1 + row.gated), row.in_features)
    assert results.kind_of(results.report_of(row.result.split(":")[0])) == kind
    times = results.times_of(line)
    sizes = dict(gated=row.gated, device_kind=kind)
    ways = tuning.candidates(count, row.out_features, row.in_features, **sizes)
    if "candidates" in line:
        assert set(times) <= set(ways)
        assert set(ways) - set(times) <= {NOT_MEASURED[kind]}  # all else that is compiled was
    assert times[choice] <= min(times.values()) * (1 + results.SPREAD)
    if choice != "cublas":
        assert times[choice] <= times["cublas"]
    assert tuning.linear_parts(count, row.out_features, row.in_features, **sizes) == ways[choice]


def test_an_lm_head_takes_the_fastest_way(results):
    for kind, found in rows.LM_HEADS.items():
        for row in found:
            for count, tile in row.choices:
                line = results.line_of(f"{row.result}/{count}")
                assert (line["rows"], line["columns"]) == (row.vocab_size, row.dim)
                times, choice = line["candidates"], str(tile) if tile else "cublas"
                assert times[choice] <= min(times.values()) * (1 + results.SPREAD)
                assert times[choice] <= times["cublas"]
                assert tuning.lm_head_tile(count, row.vocab_size, row.dim, device_kind=kind) == tile


def test_the_tables_are_what_the_results_give(results):
    """`python bench/tuning_rows.py --write` brings them up to date."""
    for file, text in results.sources().items():
        assert (Path(rows.__file__).parent / file).read_text() == text
    assert rows.PRODUCTS and {kind.capability for kind in rows.PRODUCTS} == {(9, 0)}
    assert bool(rows_attention.ATTENTION) == (results.RESULTS / "attention.json").is_file()


def attention_way(monkeypatch, kind, line):
    """ "units", "tiles" or "triton": what runs by default for a pack."""
    monkeypatch.setattr(tuning.attention, "device_kind", lambda device: kind)
    heads, pages = (line["num_heads"], line["num_kv_heads"]), line["keys"] // line["page_size"]
    units = tuning.plans_units(
        *heads,
        line["page_size"],
        pages,
        line["distinct_rows"],
        torch.device("cuda"),
        num_tokens=line["tokens"],
    )
    sizes = dict(num_tokens=line["tokens"], num_keys=line["keys"], head_dim=line["head_dim"])
    first = tuning.preference("varlen_attention", **sizes, element_size=2, units=int(units))[0]
    return "triton" if first == "triton" else "units" if units else "tiles"


def test_attention_takes_the_fastest_way(results, monkeypatch):
    slow = {}
    for kind, found in rows_attention.ATTENTION.items():
        for row in found:
            line = results.line_of(row.result)
            sizes = row.num_heads, row.num_kv_heads, row.num_tokens, row.num_keys, row.distinct_rows
            names = "num_heads", "num_kv_heads", "tokens", "keys", "distinct_rows"
            assert sizes == tuple(line[name] for name in names)
            times = line["candidates"]
            assert times[row.choice] == min(times.values())
            way = attention_way(monkeypatch, kind, line)
            if times[way] > times[row.choice] * (1 + results.SPREAD):
                slow[row.result] = way, times
    assert not slow  # the rule of plans_units and cuda_attention_is_faster takes another way


def operator_lines(results):
    for file in ("ops.json", "ops_rotated.json", "ops_lm_head.json"):
        for model, lines in results.report_of(file)["models"].items():
            for line in lines:
                yield file, model, line, {name: value["us"] for name, value in line["versions"].items()}


SHAPE = re.compile(r"(.+) queries, (\d+) keys, (\d+)/(\d+) heads of (\d+), (shared|separate) pages")


def test_attention_beside_the_other_operators(results, monkeypatch):
    """The same rule against the packs of ops.json, whose "cuda" is what the rule plans there."""
    seen = 0
    for _, _, line, times in operator_lines(results):
        if line["op"] != "varlen_attention":
            continue
        queries, keys, heads, kv_heads, head_dim, pages = SHAPE.fullmatch(line["shape"]).groups()
        counts = [int(count) for count in queries.split("+")]
        pack = dict(
            tokens=sum(counts),
            keys=int(keys),
            num_heads=int(heads),
            num_kv_heads=int(kv_heads),
            head_dim=int(head_dim),
            page_size=16,
            distinct_rows=1 if pages == "shared" else len(counts),
        )
        way = attention_way(monkeypatch, tuning.H100, pack)
        chosen = times["triton" if way == "triton" else "cuda"]
        assert chosen <= min(times["cuda"], times["triton"]) * (1 + results.SPREAD), line["shape"]
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("row", backends.DEFAULTS, ids=lambda row: row.op)
def test_a_default_backend_is_the_fastest(results, row):
    assert tuning.preference(row.op) == row.order
    file, op = row.results.split(": ")
    lines = [
        (times, line["shape"])
        for found, _, line, times in operator_lines(results)
        if (found, line["op"]) == (file, op) == (file, row.op)
    ]
    assert lines
    if row.op == "attention_plan":
        return  # see below
    for times, shape in lines:
        best = min(times[name] for name in row.order)
        limit = best * (1 + results.SPREAD)
        if row.order[0] == "cuda":
            limit = max(limit, best + tuning.backends.WORTH_US)
        assert times[row.order[0]] <= limit, shape


def test_a_plan_and_its_attention_are_the_fastest_together(results):
    from random_models import SHAPES

    for name in ("llada-8b", "dream-7b"):
        found = {
            line["op"]: times
            for file, model, line, times in operator_lines(results)
            if file == "ops.json" and model == name and not line["shape"].endswith("separate pages")
        }
        plan, attention = found["attention_plan"], found["varlen_attention"]
        cuda, triton = (plan[way] + SHAPES[name].num_layers * attention[way] for way in ("cuda", "triton"))
        assert cuda <= triton


def test_every_measured_operator_has_a_row(results):
    measured = {line["op"] for _, _, line, _ in operator_lines(results)}
    assert measured - {"varlen_attention"} == {row.op for row in backends.DEFAULTS}


def test_a_kind_without_results_takes_those_of_less_memory():
    table = {tuning.H100: (1,), tuning.H200: (2,)}
    for kind, expected in ((tuning.H100, (1,)), (tuning.H200, (2,)), (H100_PCIE, ())):
        assert records.of_kind(table, kind) == expected
    assert records.of_kind({tuning.H100: (1,)}, tuning.H200) == (1,)
    sizes = dict(num_tokens=128, out_features=4096, in_features=4096, gated=False)
    both = [tuning.linear_fp8_tile(**sizes, device_kind=kind) for kind in (tuning.H100, tuning.H200)]
    assert both[0] == both[1] != tuning.linear_fp8_tile(**sizes, device_kind=H100_PCIE)


def test_comments_hold_no_time():
    for path in Path(tuning.__file__).parent.glob("*.py"):
        found = re.search(r"\d (us|ms|microseconds|milliseconds)\b", path.read_text())
        assert found is None, f"{path.name}: {found and found[0]}"


def test_counts_between_the_measured_ones_go_up_to_the_next():
    row = rows.PRODUCTS[tuning.H100][0]
    sizes = row.out_features, row.in_features
    counts = [count for count, _ in row.choices]
    assert counts[-1] == 252
    for number in range(1, 257):
        measured = next((count for count in counts if count >= number), counts[-1])
        got, expected = (tuning.linear_parts(n, *sizes, gated=row.gated) for n in (number, measured))
        assert got == expected
    assert tuning.linear_parts(257, *sizes, gated=row.gated) == ()


@pytest.mark.parametrize("gated", [False, True])
def test_another_device_of_the_same_architecture_fills_its_own_waves(gated):
    seen = set()
    for num_tokens in (8, 64, 128, 192, 252):
        for out_features, in_features in ((12288, 4096), (4096, 12288), (18944, 3584), (5120, 2048)):
            sizes = num_tokens, out_features, in_features
            got = tuning.linear_parts(*sizes, gated=gated, device_kind=H100_PCIE)
            assert got == tuning.linear_rule(*sizes, gated=gated, device_kind=H100_PCIE)
            assert sum(part.features for part in got) in (0, out_features)
            if len(got) == 2:
                assert got[0].features % (114 * 96) == 0
            seen.add(got == tuning.linear_rule(*sizes, gated=gated))
    assert seen == {False, True}  # some shapes are cut for 132 processors otherwise
    assert tuning.lm_head_tile(8, 192 * 114, 4096, device_kind=H100_PCIE) == 16
    assert tuning.lm_head_tile(8, 192 * 114, 4096) == 0


def test_the_rule_serves_what_nobody_measured():
    """Products of Qwen3-8B, and halves of those of LLaDA-8B and Dream-7B."""
    for out_features, in_features in ((6144, 4096), (4096, 2048), (4096, 6144), (2304, 3584), (3584, 9472)):
        for num_tokens in (8, 64, 128):
            sizes = num_tokens, out_features, in_features
            parts = tuning.linear_parts(*sizes, gated=False)
            assert len(parts) == 1 and parts[0].tile.tokens >= num_tokens
            assert tuning.name_of(parts) in tuning.candidates(*sizes, gated=False)


@pytest.mark.parametrize("gated", [False, True])
def test_candidates_hold_every_tile_with_room(gated):
    tiles = tuning.GATED_TILES if gated else tuning.LINEAR_TILES
    for num_tokens in (1, 16, 17, 128, 252, 256):
        found = tuning.candidates(num_tokens, 18944, 3584, gated=gated)
        assert found["cublas"] == ()
        alone = {parts[0].tile for parts in found.values() if len(parts) == 1}
        assert alone == {tile for tile in tiles if tile.tokens >= num_tokens}
        for name, parts in found.items():
            assert tuning.name_of(parts) == name
            assert sum(part.features for part in parts) in (0, 18944)
    # A sum too short to be shared, and sizes that no tile takes.
    short = tuning.candidates(64, 18944, 512, gated=gated)
    assert len(short) > 1 and not any("split_k" in name for name in short)
    for sizes in ((0, 4096, 4096), (257, 4096, 4096), (8, 4097, 4096), (8, 4096, 4100)):
        assert tuning.candidates(*sizes, gated=gated) == {"cublas": ()}


def test_attention_over_e4m3_takes_the_fastest_way(results, monkeypatch):
    report = results.report_of("attention_fp8.json")
    kind = tuning.H100
    monkeypatch.setattr(tuning.attention, "device_kind", lambda device: kind)
    slow = {}
    for line in report["models"]["llada-8b"]:
        pages = line["keys"] // 16
        sizes = 32, 32, 16, pages, line["distinct_rows"], torch.device("cuda")
        units = tuning.plans_units(*sizes, num_tokens=line["tokens"], e4m3=True)
        way = "units" if units else "tiles"
        times = {name: line["us"][name] for name in ("units", "tiles", "triton")}
        # Its figures stand closer together, and none is worth another kernel.
        if times[way] > 1.1 * min(times.values()):
            slow[line["case"]] = way, times
    assert not slow
