"""The command line: in subprocesses where pipes, terminals and signals matter, in this process elsewhere."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest
import tokenizers

import blockbatch
from blockbatch.cli import canvas, main, terminal
from blockbatch.tracing import replay
from plain_models import write_llada

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("one", "two", "three", "four")
VOCABULARY = 160  # of the checkpoint in tests/data/conformance: EOS 158, MASK 159
PROMPT = "one two three"


def nasty_token(index):
    """Text that a terminal must not obey (colour, title, cursor movement), wide and combining characters."""
    attack = ("\x1b]0;title\x07", "\x1b[2J", "\x9b5A", "\r", "\u202e", "\x7f")[index % 6]
    return f"\x1b[35m{attack}t{index}" + ("", "漢字", "e\u0301", "\n", "\t")[index % 5] + " "


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests/data/conformance" / name, folder)
    texts = [*WORDS, *map(nasty_token, range(len(WORDS), VOCABULARY - 2)), "<|endoftext|>", "<|mdm_mask|>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(dict(zip(texts, range(VOCABULARY))), texts[0])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(texts[-2:])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def expected(model_folder):
    """What the Python interface gives for PROMPT in 64 tokens."""
    config = blockbatch.DecodeConfig(gen_length=64, eos_exit="none")
    result = blockbatch.generate(blockbatch.load_model(model_folder, device="cpu"), PROMPT, config)
    assert len(set(result.tokens)) > 5 and "\x1b" in result.text  # else the tests below would show little
    return result


def generate_arguments(folder, *more):
    return [
        "generate",
        "--model",
        str(folder),
        "--prompt",
        PROMPT,
        "--gen-length",
        "64",
        "--eos-exit",
        "none",
        *more,
    ]


def environment(**more):
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    # One thread: on a busy machine the threads of several processes spin while they wait for each other.
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **more}


def run(*arguments, **options):
    options = {"capture_output": True, "timeout": 120, "env": environment(), **options}
    return subprocess.run([sys.executable, "-m", "blockbatch", *arguments], **options)


def run_in_terminal(arguments, columns=80, rows=24, on_output=None, **env):
    """Exit status and all that the command wrote, its input, output and errors being a new terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "blockbatch", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**env), start_new_session=True,
        # A shell starts what it puts into the background deaf to interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(theirs)
    output = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other side has closed
            piece = b""
        if not piece:
            break
        output += piece
        if on_output:
            on_output(process, output)
    os.close(ours)
    return process.wait(timeout=60), output.decode(errors="replace")  # an interrupt may cut a character


class Terminal:
    """Just enough of a terminal to read the screen; anything that it does not know fails the test."""

    SEQUENCE = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])")
    CUT_SEQUENCE = re.compile(r"\x1b(\[\??\d*)?(?=\x1b)")

    def __init__(self, columns):
        self.columns, self.lines, self.row, self.column = columns, [[]], 0, 0
        self.cursor_shown = self.wraps = True
        self.styles = set()

    def feed(self, text):
        position = 0
        while position < len(text):
            # A new escape character ends an unfinished sequence.
            if cut := self.CUT_SEQUENCE.match(text, position):
                position = cut.end()
                continue
            if match := self.SEQUENCE.match(text, position):
                self.control(*match.groups())
                position = match.end()
                continue
            char = text[position]
            if char == "\n":
                self.row += 1
                self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]
            elif char == "\r":
                self.column = 0
            elif char == "\t":
                self.column = min((self.column // 8 + 1) * 8, self.columns - 1)
            else:
                assert unicodedata.category(char) not in ("Cc", "Cf"), f"{char!r} reached the terminal"
                self.put(char)
            position += 1
        return self

    def put(self, char):
        width = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if self.column + width > self.columns:
            assert self.wraps, "a frame's line is wider than the terminal"
            self.feed("\r\n")
        line = self.lines[self.row]
        line += [" "] * (self.column - len(line))
        if width:
            line[self.column : self.column + width] = [char] + [""] * (width - 1)
        else:
            line[self.column - 1] += char
        self.column += width

    def control(self, private, number, kind):
        if private:
            assert number in ("25", "7") and kind in "hl"
            self.cursor_shown = kind == "h" if number == "25" else self.cursor_shown
            self.wraps = kind == "h" if number == "7" else self.wraps
        elif kind == "A":
            self.row -= int(number)
            assert self.row >= 0, "the cursor left the screen"
        elif kind in "KJ" and number in ("", "0"):
            del self.lines[self.row][self.column :]
            if kind == "J":
                del self.lines[self.row + 1 :]
        else:
            assert kind == "m"
            self.styles.add(number)

    def text(self):
        return "\n".join("".join(line) for line in self.lines)


def test_generate_writes_the_text_alone_to_a_pipe(model_folder, expected):
    done = run(*generate_arguments(model_folder))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected.text.removesuffix("\n") + "\n"


def test_generate_json_and_trace(model_folder, expected, tmp_path):
    trace = tmp_path / "trace.json"
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text(PROMPT + "\n")
    arguments = generate_arguments(model_folder, "--json", "--trace", str(trace))
    arguments[3:5] = ["--prompt-file", "-"]
    done = run(*arguments, stdin=prompt_file.open())
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert (report["text"], report["tokens"]) == (expected.text, expected.tokens)
    assert report["nfe"] == {**vars(expected.nfe), "total": expected.nfe.total}
    assert report["branches"] == [vars(branch) for branch in expected.branches]
    assert report["stop_reason"] == expected.stop_reason and report["block_size"] == expected.block_size
    assert report["tokens_per_second"] == pytest.approx(len(expected.tokens) / report["seconds"])
    assert report["method"] == "blockbatch"
    assert (
        report["settings"]["block_sizes"] == [4, 8, 16, 32, 64] and report["settings"]["eos_exit"] == "none"
    )

    saved = json.loads(trace.read_text())
    assert saved["prompt_tokens"] == [0, 1, 2] and saved["model"] == str(model_folder)
    sizes = saved["block_sizes"]
    canvases = replay(saved["trace"], len(sizes), saved["gen_length"], saved["mask_token_id"])
    assert canvases[sizes.index(saved["winner_block_size"])] == saved["canvas"] == expected.canvas
    assert sorted(os.listdir(tmp_path)) == ["prompt.txt", "trace.json"]


def test_only_given_options_reach_the_config(model_folder, capsys):
    options = ["--method", "dual_cache", "--threshold", "none", "--steps", "32", "--block-size", "16"]
    arguments = [
        "generate",
        "--model",
        str(model_folder),
        "--prompt-ids",
        "1,2",
        "--gen-length",
        "64",
        *options,
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = blockbatch.DecodeConfig("dual_cache", gen_length=64, threshold=None, steps=32, block_size=16)
    result = blockbatch.generate(blockbatch.load_model(model_folder, device="cpu"), [1, 2], config)
    assert report["tokens"] == result.tokens and report["nfe"]["total"] == result.nfe.total == 32
    assert report["settings"] == {
        "gen_length": 64, "block_size": 16, "eos_exit": "none", "threshold": None, "steps": 32,
        "eos_token_ids": None, "stop": [],
    }  # fmt: skip


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


def test_compare_prints_a_row_for_each_method_and_end(model_folder, tmp_path):
    problems_file, figures = tmp_path / "problems.jsonl", tmp_path / "figures.json"
    problems_file.write_text('{"prompt": "one two", "answer": "no such answer"}\n\n{"prompt": "three"}\n')
    arguments = [
        "--model",
        str(model_folder),
        "--prompt-file",
        str(problems_file),
        "--gen-length",
        "32",
        "--show",
    ]
    done = run("compare", *arguments, "--json", str(figures))
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    baselines = ["vanilla", "prefix_cache", "dual_cache", "local_leap"]
    labels = [*baselines, *(f"{name} +eos" for name in baselines), "blockbatch"]
    table = {line[:17].strip(): line[17:].split() for line in lines[:16] if line[:17].strip() in labels}
    assert list(table) == labels
    rows = {row["label"]: row for row in json.loads(figures.read_text())["rows"]}
    model = blockbatch.load_model(model_folder, device="cpu")
    for label, row in rows.items():
        end = "prefix" if label.endswith("+eos") or label == "blockbatch" else "none"
        config = blockbatch.DecodeConfig(label.split()[0], gen_length=32, eos_exit=end)
        results = blockbatch.generate(model, ["one two", "three"], config)
        assert [problem["text"] for problem in row["problems"]] == [result.text for result in results]
        assert row["nfe"] == sum(result.nfe.total for result in results) / 2
        tokens, seconds = (
            sum(problem[name] for problem in row["problems"]) for name in ("tokens", "seconds")
        )
        assert tokens == sum(len(result.tokens) for result in results)
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        right, nfe, seconds, *_, fewer = table[label]
        assert right == "0/1" and nfe == f"{row['nfe']:.1f}" and seconds == f"{row['seconds']:.2f}"
        assert fewer == f"{rows['vanilla +eos']['nfe'] / row['nfe']:.1f}x"
    assert table["vanilla"][4:6] == ["1.0x", "1.0x"]
    assert all(len(line) <= 80 for line in lines[: lines.index("Prompt")])
    assert "  one two" in lines


def test_compare_judges_the_built_in_problems(tmp_path, monkeypatch, model_folder, capsys):
    monkeypatch.setattr("blockbatch.tasks.built_in.check", lambda problem, text: problem.family == "code")
    tokenizer = tokenizers.Tokenizer.from_file(str(ROOT / "python/blockbatch/tiny/checkpoint/tokenizer.json"))
    write_llada(
        tmp_path, vocab_size=tokenizer.get_vocab_size(), d_model=16, n_layers=1, max_sequence_length=512
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = [
        "--count",
        "4",
        "--family",
        "code",
        "--family",
        "symbolic",
        "--methods",
        "blockbatch,dual_cache",
    ]
    assert main(["compare", "--model", str(tmp_path), "--gen-length", "32", *arguments]) == 0
    text = capsys.readouterr().out
    assert "8 problems (4 code, 4 symbolic)" in text and "vs vanilla" not in text
    assert re.search(r"^right +code +symbolic$", text, re.M)
    assert re.findall(r"^(\w+(?: \+eos)?) +4/8 ", text, re.M) == [
        "dual_cache",
        "blockbatch",
        "dual_cache +eos",
    ]
    assert len(re.findall(r"4/4 +0/4$", text, re.M)) == 3


BAD_INPUT = {
    "block_sizes: expected divisors of gen_length = 64, got 7": ["--block-sizes", "7"],
    "merge_threshold: expected a value from 0.5 to 1, got 0.3": ["--merge-threshold", "0.3"],
    "method: expected one of blockbatch, vanilla": ["--method", "magic"],
    "steps: not an option of blockbatch": ["--steps", "8"],
    "--trace: expected a file in an existing folder": ["--trace", "no/such/folder/trace.json"],
    "model: expected an existing folder": ["--model", "no such folder"],
    "dtype: expected one of float32": ["--dtype", "int8"],
    "backend: expected None, 'reference'": ["--backend", "magic"],
    "prompt: expected prompt and gen_length to fit in 512": ["--gen-length", "512"],
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(model_folder, capsys, message):
    assert main([*generate_arguments(model_folder), *BAD_INPUT[message]]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"blockbatch: error: {message}")
    assert printed.err.count("\n") == 1


def test_bad_prompts(model_folder, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one"}\n{"prompt": 3}\n')
    generate, compare = ["generate", "--model", str(model_folder)], ["compare", "--model", str(model_folder)]
    cases = {
        "--prompt-file: expected UTF-8": [*generate, "--prompt-file", str(tmp_path / "latin.txt")],
        f"{tmp_path}/none: No such file": [*generate, "--prompt-file", str(tmp_path / "none")],
        "--prompt: expected UTF-8 text": [*generate, "--prompt", "\udcff"],
        "prompt: expected no MASK token (id 159)": [*generate, "--prompt-ids", "1,159"],
        "prompt: expected ids from 0 to 159, got 160": [*generate, "--prompt-ids", "160"],
        "--chat: expected a prompt as text": [*generate, "--prompt-ids", "1", "--chat"],
        "tokenizer: the chat format": [*generate, "--prompt", "one", "--chat"],
        f"--prompt-file: {tmp_path}/lines.jsonl, line 2": [
            *compare,
            "--prompt-file",
            str(tmp_path / "lines.jsonl"),
        ],
        "--family: expected one of": [*compare, "--family", "poetry"],
        "--count: expected at least 1": [*compare, "--count", "0"],
        "--methods: expected some of": [*compare, "--methods", "magic"],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2, message
        error = capsys.readouterr().err
        assert error.startswith(f"blockbatch: error: {message}") and error.count("\n") == 1


def test_arguments_that_argparse_refuses(capsys):
    for arguments, message in {
        (): "the following arguments are required: COMMAND",
        ("generate",): "one of the arguments --prompt --prompt-file --prompt-ids is required",
        ("generate", "--prompt", "x", "--threshold", "high"): "expected a number or none, got 'high'",
        ("generate", "--prompt", "x", "--gen", "8"): "unrecognized arguments: --gen 8",
    }.items():
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert "\nblockbatch: error: " in error and message in error


def test_version_and_help_name_what_there_is(capsys):
    for arguments in (["--version"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"blockbatch {blockbatch.__version__}\n")
    assert all(method in text for method in blockbatch.METHODS)


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
