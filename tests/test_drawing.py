"""bench/drawing.py draws real decodes: what its pictures show is there to be shown."""

import importlib.util
from pathlib import Path

import pytest

import blockbatch
from blockbatch.pictures import states as replayed

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "bench" / "drawing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_decode_has_what_the_page_explains(drawing, tmp_path):
    model = blockbatch.load_model("tiny", device="cpu")
    trace = drawing.traced(model, block_sizes=drawing.SIZES)
    states = replayed.expand(trace)
    assert set(states.phases) == {"init", "block", "refresh"}
    assert any(states.syncs) and (states.change == replayed.MERGED).any()
    for name, draw in drawing.DRAWN.items():
        pytest.importorskip("matplotlib")
        draw(model, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
