"""Byte-level BPE of the built-in model: single digits, an EOS (also padding) and a MASK token.

`python -m blockbatch.tiny.tokenizer --out FILE` rebuilds tokenizer.json from the problem generators.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from blockbatch.tasks.built_in import FAMILIES, generate_problems
from blockbatch.tiny.drills import draw_drill

EOS = "<|endoftext|>"
MASK = "<|mdm_mask|>"
VOCABULARY = 1536
TOKENIZER_FILE = Path(__file__).parent / "checkpoint" / "tokenizer.json"

# Words with the space before them, digits one by one, runs of punctuation, runs of white space.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\s\p{L})|\s+"


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocabulary` tokens; EOS is the last id but one, MASK the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The merges end where every piece of the texts is whole; reserved tokens fill up to a multiple of 8.
    reserved = -(tokenizer.get_vocab_size() + 2) % 8
    tokenizer.add_special_tokens([*(f"<|reserved_{index}|>" for index in range(reserved)), EOS, MASK])
    return tokenizer


def load_tokenizer(path: str | Path = TOKENIZER_FILE) -> Tokenizer:
    """The tokenizer in `path`; `decode(ids, skip_special_tokens=False)` undoes `encode(text).ids`."""
    return Tokenizer.from_file(str(path))


def tokenizer_config() -> dict[str, object]:
    """What belongs into tokenizer_config.json beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TOKENIZER_FILE)
    parser.add_argument("--problems", type=int, default=30_000, help="training problems per family")
    arguments = parser.parse_args()
    texts = [
        text
        for family in FAMILIES
        for problem in generate_problems(family, "train", arguments.problems, seed=0)
        for text in (problem.prompt, problem.answer)
    ]
    rng = random.Random("drills")
    texts += [text for _ in range(arguments.problems // 4) for text in draw_drill(rng)]
    tokenizer = train_tokenizer(texts)
    tokenizer.save(str(arguments.out))
    print(json.dumps({"vocabulary": tokenizer.get_vocab_size(), "file": str(arguments.out)}))


if __name__ == "__main__":
    main()
