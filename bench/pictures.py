"""The pictures of the README, of real decodes of the built-in model.

    python bench/pictures.py [--out bench/results/pictures]

One prompt by BlockBatch and by every block size alone gives the replay page, the consensus heat map and the
K/V trajectories; the decodes of many problems give the agreement by kind of token. Accuracy against forwards
is drawn from an evaluation:

    blockbatch eval --methods blockbatch,fixed-blocks --limit 60 --batch-size 6 --run-code \\
        --out bench/results/block_sizes

Where there is a Chromium, the page is also photographed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import blockbatch
from blockbatch import tiny
from blockbatch.cli import main as command
from blockbatch.methods import PAPER_BLOCK_SIZES
from blockbatch.tracing import trace_header

RESULTS = Path(__file__).parent / "results"
# The branches disagree on its last line, and the wrong one wins.
PROMPT = "Divide with remainder until zero: 51 and 16."
PHOTOGRAPHED_FORWARD = 9
GEN_LENGTH = 128
PROBLEMS = 40  # of each family, for the agreement


def save(model: blockbatch.Model, prompt: str, path: Path, **settings) -> None:
    """Decodes a prompt and writes its trace."""
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH, trace=True, **settings)
    result = blockbatch.generate(model, prompt, config)
    header = trace_header(model, model.tokenizer.encode(prompt), config, result)
    blockbatch.save_trace(path, result.trace, **header)


def picture(*arguments: str | Path) -> None:
    if command(["picture", *map(str, arguments)]):
        raise SystemExit(f"pictures.py: no picture of {arguments}")


def photograph(page: Path, target: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print(f"{target}: no browser to make it with")
        return
    with tempfile.TemporaryDirectory() as profile:
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1130".split()
        address = f"{page.resolve().as_uri()}#forward={PHOTOGRAPHED_FORWARD}"
        subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", f"--screenshot={target.resolve()}", address],
            check=True,
            capture_output=True,
            timeout=120,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "pictures")
    parser.add_argument("--evaluation", type=Path, default=RESULTS / "block_sizes" / "results.jsonl")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = blockbatch.load_model("tiny", device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together = folder / "blockbatch.json"
        save(model, PROMPT, together, trace_kv=True)
        alone = [folder / f"block_{size}.json" for size in PAPER_BLOCK_SIZES]
        for size, path in zip(PAPER_BLOCK_SIZES, alone, strict=True):
            settings = {"method": "dual_cache", "block_size": size, "eos_exit": "prefix"}
            save(model, PROMPT, path, trace_kv=True, **settings)
        picture("replay", together, "--out", options.out / "replay.html")
        picture("consensus", together, "--out", options.out / "consensus.png")
        picture("trajectories", together, *alone, "--out", options.out / "trajectories.png")
        many = folder / "many"
        many.mkdir()
        for family in tiny.FAMILIES:
            for number, problem in enumerate(tiny.generate_problems(family, "test", PROBLEMS, 0)):
                save(model, problem.prompt, many / f"{family}_{number}.json")
        picture("agreement", many, "--out", options.out / "agreement.png")
    photograph(options.out / "replay.html", options.out / "replay.png")
    picture("frontier", options.evaluation, "--out", options.out / "frontier.png")


if __name__ == "__main__":
    main()
