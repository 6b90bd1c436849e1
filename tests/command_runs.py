"""The command line run as a program, in pipes and in terminals, on a model whose texts are dangerous."""

import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import tokenizers

import blockbatch

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("one", "two", "three", "four")
VOCABULARY = 160  # of the checkpoint in tests/data/conformance: EOS 158, MASK 159
PROMPT = "one two three"


def nasty_token(index):
    """Text that a terminal must not obey (colour, title, cursor movement), wide and combining characters."""
    attack = ("\x1b]0;title\x07", "\x1b[2J", "\x9b5A", "\r", "\u202e", "\x7f")[index % 6]
    return f"\x1b[35m{attack}t{index}" + ("", "漢字", "e\u0301", "\n", "\t")[index % 5] + " "


def write_model(folder):
    """A checkpoint whose tokens are texts that a terminal must not obey; returns the folder."""
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


def decode_prompt(model_folder):
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
