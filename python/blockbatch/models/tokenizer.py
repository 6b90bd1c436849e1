"""Text to token ids and back, from the tokenizer files of a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from blockbatch.models.chat import format_chat
from blockbatch.models.checkpoint import read_json
from blockbatch.models.spec import CheckpointError, ModelSpec, read_token_ids

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
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_ids: Iterable[int] = ()) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        known = (backend.token_to_id(token) for token in KNOWN_ENDS)
        self._end_ids = frozenset(end_ids) | {token for token in known if token is not None}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json + merges.txt of a Qwen2-like tokenizer (Dream).

        Raises:
            CheckpointError: there is no tokenizer of these kinds, or a file of it is broken.
        """
        folder = Path(folder)
        settings = _read_optional(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            backend = _from_tokenizer_json(folder / "tokenizer.json")
        elif has_tokenizer(folder):
            backend = _from_qwen2_files(folder, settings)
        else:
            raise CheckpointError(
                f"{folder}: expected a tokenizer (tokenizer.json, or vocab.json and merges.txt), got none"
            )
        _add_tokens(folder, backend, settings)
        generation = _read_optional(folder / "generation_config.json")
        end_ids = set(read_token_ids(generation, "eos_token_id", source="generation_config.json"))
        eos = settings.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if eos is not None:
            token = backend.token_to_id(eos) if isinstance(eos, str) else None
            if token is None:
                raise CheckpointError(
                    f"{folder}: tokenizer_config.json: eos_token must be a known token, got {eos!r}"
                )
            end_ids.add(token)
        return cls(backend, end_ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in it are recognised; none is added."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
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


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    # The backend raises bare Exception for a broken file.
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: expected a tokenizer, got {error}") from None


def _from_qwen2_files(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    kind = settings.get("tokenizer_class")
    if kind not in QWEN2_CLASSES:
        raise CheckpointError(
            f"{folder}: vocab.json and merges.txt without tokenizer.json need tokenizer_class in "
            f"tokenizer_config.json to be one of {', '.join(QWEN2_CLASSES)}, got {kind!r}"
        )
    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
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
    return backend


def _add_tokens(folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens_decoder` that the tokenizer lacks, at the ids written there."""
    listed = settings.get("added_tokens_decoder") or {}
    source = f"{folder}: tokenizer_config.json: added_tokens_decoder"
    try:
        tokens = sorted((int(token_id), fields["content"], fields) for token_id, fields in listed.items())
    except (AttributeError, TypeError, ValueError, KeyError):
        raise CheckpointError(f"{source}: expected {{id: {{content, ...}}}}, got {listed!r:.80}") from None
    for token_id, content, fields in tokens:
        if backend.token_to_id(content) is None:
            flags = {
                key: bool(fields.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")
            }
            added = tokenizers.AddedToken(content, special=bool(fields.get("special", False)), **flags)
            backend.add_tokens([added])
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{source}: expected {content!r} at id {token_id}, got id {backend.token_to_id(content)}"
            )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
