"""examples/chat.py, run as it stands there."""

import runpy
from pathlib import Path

import blockbatch
from test_callers import load

EXAMPLE = Path(__file__).parents[1] / "examples" / "chat.py"


def test_a_conversation_of_two_turns(tmp_path, monkeypatch, capsys):
    model = load(tmp_path, "llada")
    lines = iter(["One?", "Two?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(blockbatch, "load_model", lambda name: model)
    monkeypatch.setattr("sys.argv", ["chat.py", str(tmp_path), "32"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    config = blockbatch.DecodeConfig.preset("fast", gen_length=32)
    first = model.chat("One?", config)
    turns = [("user", "One?"), ("assistant", first.text), ("user", "Two?")]
    second = model.chat([{"role": role, "content": text} for role, text in turns], config)
    assert said.startswith(first.text + f"\n[{len(first.tokens)} tokens, {first.nfe.total} forwards, ")
    assert second.text in said and said.endswith("\n2 answers\n")
