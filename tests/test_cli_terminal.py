"""The command line on a terminal: drawing, interrupts, and readers that go away."""

import os
import signal
import subprocess

import pytest

from blockbatch.cli import canvas, terminal
from command_runs import decode_prompt, generate_arguments, run, run_in_terminal, write_model
from terminal_screen import Terminal


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model_folder):
    return decode_prompt(model_folder)


@pytest.mark.parametrize(("columns", "rows", "env"), [(80, 40, {}), (18, 7, {"NO_COLOR": "1"})])
def test_live_drawing_leaves_the_text_and_a_summary(model_folder, expected, columns, rows, env):
    status, output = run_in_terminal(generate_arguments(model_folder), columns, rows, **env)
    assert status == 0
    frames = output.count(terminal.HIDE_CURSOR)
    assert frames >= 3
    screen = Terminal(columns).feed(output)
    assert screen.cursor_shown and screen.wraps
    shown = Terminal(columns).feed(terminal.escape(expected.text).replace("\n", "\r\n"))
    text = screen.text()
    assert text.startswith(shown.text().rstrip())
    rest = "".join(text[len(shown.text().rstrip()) :].split())
    total = f"NFE{expected.nfe.total}={expected.nfe.init}init+"
    assert rest.startswith("blockbatch") and total in rest and f"stop:{expected.stop_reason}" in rest
    colours = {style for style in screen.styles if style.startswith(("3", "4")) and len(style) == 2}
    assert bool(colours) == (not env)


def test_ctrl_c_ends_cleanly(model_folder, tmp_path):
    sent = []

    def interrupt(process, output):
        if not sent and output.count(b"\x1b[?25l") >= 3:
            sent.append(os.kill(process.pid, signal.SIGINT))

    long = ["--gen-length", "448", "--method", "vanilla", "--trace", str(tmp_path / "trace.json")]
    arguments = [*generate_arguments(model_folder), *long]
    status, output = run_in_terminal(arguments, on_output=interrupt)
    assert status == 130
    assert output.endswith("\x1b[Jblockbatch: interrupted\r\n") and "Traceback" not in output
    screen = Terminal(80).feed(output)
    assert screen.cursor_shown and screen.wraps
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error(model_folder):
    reading, writing = os.pipe()
    os.close(reading)
    done = run(
        *generate_arguments(model_folder), capture_output=False, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_canvas_shows_who_holds_what():
    mask, eos = 9, 8
    view = canvas.View(
        tokens=[[1, 2, mask, 3, mask, eos, 4], [1, mask, mask, 5, 2, mask, mask]],
        block_sizes=[2, 4], leader=0, window=(2, 4), nfe=3, mask_token_id=mask, eos_token_ids=(eos,),
    )  # fmt: skip
    spans = canvas.canvas_spans(view, lambda ids: [str(token) for token in ids], canvas.ASCII)
    assert "".join(text for _, text in spans) == "12=3_$"
    assert [role for role, _ in spans] == ["final", "leading", "window", "leading", "mask", "leading"]
    for columns, rows in ((80, 24), (12, 9), (5, 3), (2, 2)):
        lines = canvas.frame(view, canvas.token_pieces(None), canvas.ASCII, "title", 1.5, columns, rows)
        assert any(role == "window" for line in lines[: rows - 1] for role, _ in line) or columns < 5
    assert "".join(text for _, text in canvas.frame(view, str, canvas.ASCII, "t", 1.5, 80, 24)[-1]) == (
        "block 2 leads | NFE 3 | 5 of 7 tokens | 1.5 s"
    )


def test_wrapping_counts_columns_and_keeps_every_character():
    spans = [
        terminal.Span("final", "ab漢"),
        terminal.Span("final", "字e\u0301\n"),
        terminal.Span("mask", "xyz"),
    ]
    lines = canvas.wrap(spans, 4)
    assert ["".join(text for _, text in line) for line in lines] == ["ab漢", "字e\u0301", "xyz"]
    assert all(sum(map(terminal.char_width, text)) <= 4 for line in lines for _, text in line)
    assert terminal.escape("a\x1b[2J\x9b\u202e\n\té") == "a\\x1b[2J\\x9b\\u202e\n\té"
