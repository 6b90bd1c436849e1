"""What importing the packages costs: no GPU, no extension, torch only when it is needed."""

import subprocess
import sys

import blockbatch
from blockbatch import kv_trace, trace, trace_file


def modules_after(statement):
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def test_the_bare_package_does_not_import_torch():
    assert "torch" not in modules_after("import blockbatch")
    assert "torch" not in modules_after("import blockbatch.cli")


def test_settings_and_traces_do_without_torch():
    assert "torch" not in modules_after("import blockbatch.config, blockbatch.tracing, blockbatch.tasks")


def test_every_public_name_is_there():
    names = modules_after(
        "import blockbatch\nfor name in blockbatch.__all__: getattr(blockbatch, name)\n"
        "assert set(blockbatch.__all__) <= set(dir(blockbatch))"
    )
    assert "torch" in names and "blockbatch_kernels._C" not in names


def test_traces_answer_to_their_old_names():
    assert trace.load_trace is trace_file.load_trace is blockbatch.load_trace
    assert trace.save_trace is blockbatch.save_trace
    assert kv_trace.KVSketcher.__module__ == "blockbatch.tracing.kv_states"
    assert {name for module in (trace, trace_file, kv_trace) for name in module.__all__} == {
        "KINDS", "KVSketcher", "Record", "SKETCH_SIZE", "TraceRecorder", "check_trace", "decode_settings",
        "load_trace", "open_recorder", "replay", "save_trace", "trace_header",
    }  # fmt: skip


def test_unknown_name():
    code = (
        "import blockbatch\ntry:\n    blockbatch.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "module 'blockbatch' has no attribute 'nothing'\n"
