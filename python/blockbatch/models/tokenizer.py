"""Text to token ids and back, from the tokenizer files of a model folder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from blockbatch.models import added_tokens
from blockbatch.models.chat import format_chat
from blockbatch.models.json_file import read_json, read_optional_json
from blockbatch.models.relatives import check_tokenizer
from blockbatch.models.spec import CheckpointError, ModelSpec, read_token_ids
from blockbatch.texts import check_text, decode_file

# Ends of text and of a turn in the supported families; whichever the tokenizer holds ends an answer.
KNOWN_ENDS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>")

# vocab.json + merges.txt do not say how text is split before merging. These classes all split as Qwen2 does:
# a contraction, letters with one leading character, single digits, punctuation with trailing newlines,
# whitespace.
QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
QWEN2_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def has_tokenizer(folder: Path) -> bool:
    """Whether `Tokenizer.from_folder` finds tokenizer files in `folder`."""
    folder = Path(folder)
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: the tokenizer proper.
        end_ids: ids that end a text besides config.json's (generation_config.json's, the tokenizer's EOS).
        bos_token_id: of the token that begins a text; None: there is none.
        add_bos: whether the tokenizer's settings want it in front of every text. `encode` leaves that to its
            callers.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        end_ids: Iterable[int] = (),
        *,
        bos_token_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token_id, self.add_bos = bos_token_id, add_bos
        known = (backend.token_to_id(token) for token in KNOWN_ENDS)
        self._end_ids = frozenset(end_ids) | {token for token in known if token is not None}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json + merges.txt of a Qwen2-like tokenizer (Dream).

        Which added tokens there are, and which are special, `added_tokens` says.

        Raises:
            CheckpointError: there is no tokenizer of these kinds, or a file of it is broken.
        """
        folder = Path(folder)
        settings = read_optional_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            backend = _from_tokenizer_json(folder, settings)
        elif has_tokenizer(folder):
            backend = _from_qwen2_files(folder, settings)
        else:
            raise CheckpointError(
                f"{folder}: expected a tokenizer (tokenizer.json, or vocab.json and merges.txt), got none"
            )
        check_tokenizer(backend.token_to_id, folder)
        generation = read_optional_json(folder / "generation_config.json")
        end_ids = set(read_token_ids(generation, "eos_token_id", source="generation_config.json"))
        eos = added_tokens.named_token(settings, folder, "eos_token")
        if eos is not None:
            token = backend.token_to_id(eos) if isinstance(eos, str) else None
            if token is None:
                raise CheckpointError(
                    f"{folder}: tokenizer_config.json: eos_token must be a known token, got {eos!r}"
                )
            end_ids.add(token)
        bos_token_id, add_bos = _read_bos(folder, backend, settings)
        return cls(backend, end_ids, bos_token_id=bos_token_id, add_bos=add_bos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in it are recognised; none is added.

        Raises:
            TypeError: it is no text.
            ValueError: it holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        check_text(text, "text")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out or written. Ids that no token has give no text."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where there is none."""
        return self._backend.token_to_id(token)

    def eos_token_ids(self, spec: ModelSpec) -> tuple[int, ...]:
        """All ids that end a text of this model, ascending.

        The union of config.json's, generation_config.json's, the tokenizer's EOS and the known ends of text
        and turn that the tokenizer holds; ids outside the model's vocabulary are left out, since they cannot
        be predicted.

        Raises:
            CheckpointError: MASK is among them.
        """
        ids = sorted(
            token for token in self._end_ids.union(spec.eos_token_ids) if 0 <= token < spec.vocab_size
        )
        if spec.mask_token_id in ids:
            raise CheckpointError(
                f"tokenizer: expected ends of text other than MASK, got id {spec.mask_token_id}"
            )
        return tuple(ids)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        family: str,
        *,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt text that asks for the assistant's next turn; see `format_chat`."""
        return format_chat(messages, family, self.token_to_id, enable_thinking)


class IncrementalDecoder:
    """Decodes a growing sequence of ids; the pieces put together are `Tokenizer.decode` of all ids.

    A character whose bytes are spread over several tokens is held back until its last token has come.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Some tokenizers treat the first token of a text differently: new ids are decoded behind old ones.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._emitted = 0  # characters of the pending ids' text that are already out

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        self._pending.extend(ids)
        text = self._pending_text()
        # What cannot be a character yet decodes to replacement characters at the end.
        stable = text.rstrip(REPLACEMENT)
        piece = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if len(stable) == len(text):
            self._context = self._pending if text else self._context + self._pending
            self._pending, self._emitted = [], 0
        return piece

    def finish(self) -> str:
        """What is still held back; bytes that never became a character come as replacement characters."""
        piece = self._pending_text()[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special)
        return self._tokenizer.decode(self._context + self._pending, self._skip_special)[len(before) :]


def _from_tokenizer_json(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    content = read_json(path)
    # The backend raises bare Exception for a broken file, and takes a byte order mark for one.
    try:
        backend = tokenizers.Tokenizer.from_str(decode_file(path.read_bytes()))
    except Exception as error:
        raise CheckpointError(f"{path}: expected a tokenizer, got {error}") from None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    own = added_tokens.read_own(path, content.get("added_tokens") or [])
    tokens = added_tokens.read_tokens(folder, settings, own, vocabulary)
    if added_tokens.holds(backend, tokens):
        return backend
    # Added tokens are numbered by their order, unless the vocabulary says their id.
    content["added_tokens"] = added_tokens.fields_of(tokens)
    if isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"].update(added_tokens.outside(tokens, vocabulary))
    return _with_ids(folder, tokenizers.Tokenizer.from_str(json.dumps(content)), tokens)


def _from_qwen2_files(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    kind = settings.get("tokenizer_class")
    if kind not in QWEN2_CLASSES:
        raise CheckpointError(
            f"{folder}: vocab.json and merges.txt without tokenizer.json need tokenizer_class in "
            f"tokenizer_config.json to be one of {', '.join(QWEN2_CLASSES)}, got {kind!r}"
        )
    try:
        vocabulary, merges = _read_bpe(folder / "vocab.json", folder / "merges.txt")
        tokens = added_tokens.read_tokens(folder, settings, (), vocabulary)
        model = tokenizers.models.BPE(vocabulary | added_tokens.outside(tokens, vocabulary), merges)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: expected a vocabulary in vocab.json and merges.txt, got {error}"
        ) from None
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([token.added() for token in tokens])
    return _with_ids(folder, backend, tokens)


def _read_bpe(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    contents = [path.read_bytes() for path in (vocabulary, merges)]
    if not any(content.startswith(codecs.BOM_UTF8) for content in contents):
        return tokenizers.models.BPE.read_file(str(vocabulary), str(merges))
    # The backend reads no byte order mark.
    ids, lines = json.loads(decode_file(contents[0])), decode_file(contents[1]).split("\n")
    return ids, [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _with_ids(
    folder: Path, backend: tokenizers.Tokenizer, tokens: Iterable[added_tokens.Token]
) -> tokenizers.Tokenizer:
    """`backend`, once each token is found at its id."""
    for token in tokens:
        if backend.token_to_id(token.content) != token.id:
            raise CheckpointError(
                f"{folder}: expected {token.content!r} at id {token.id}, got id "
                f"{backend.token_to_id(token.content)} (this kind of vocabulary has no gaps in its ids)"
            )
    return backend


def _read_bos(
    folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]
) -> tuple[int | None, bool]:
    """The id of the token that begins a text, and whether every text gets it."""
    source = f"{folder}: tokenizer_config.json"
    add_bos = settings.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise CheckpointError(f"{source}: add_bos_token must be true or false, got {add_bos!r}")
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    token = backend.token_to_id(bos) if isinstance(bos, str) else None
    if add_bos and token is None:
        raise CheckpointError(f"{source}: add_bos_token needs bos_token to be a known token, got {bos!r}")
    return token, bool(add_bos)
