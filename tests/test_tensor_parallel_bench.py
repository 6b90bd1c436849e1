"""bench/tensor_parallel.py as torchrun starts it, in its smallest form on the CPU."""

import json
import os
import subprocess
import sys

from bench_scripts import HEADER, ROOT


def test_tensor_parallel(tmp_path):
    out = tmp_path / "tensor_parallel.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "bench" / "tensor_parallel.py"), "--device", "cpu", "--dtype", "float32"]
    sizes = ["--tokens", "32", "--length", "64", "--rows", "3", "--repeats", "1", "--quick"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    finished = subprocess.run(
        [*torchrun, *script, "--shapes", "small-dream", *sizes, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    report = json.loads(out.read_text())
    assert HEADER | {"ranks", "targets", "lines"} <= set(report)
    step, refresh = report["lines"]
    assert (step["kind"], step["tokens"], refresh["kind"], refresh["rows"]) == ("step", 32, "refresh", 3)
    for line in (step, refresh):
        assert line["checks"]["same_state_on_all_ranks"] and line["ranks"] == 2
        assert min(line["ranks_ms"], line["one_ms"], line["products_ms"]) > 0
    dealt = refresh["whole_rows_checks"]
    assert refresh["whole_rows_ms"] > 0 and dealt["same_state_on_all_ranks"]
    assert dealt["difference_of_keys_and_values_from_one"] < 1e-5 and dealt["top_tokens_equal_to_one"] == 1.0
    assert 0 < step["checks"]["hidden_error"] < 1e-5, step["checks"]
    assert set(step["all_reduce_us"]) == {"gloo"}
    assert set(step["head_us"]) == {"ranks", "one", "ranks_drawn", "one_drawn"}
