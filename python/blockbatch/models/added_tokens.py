"""Tokens beside a tokenizer's vocabulary, and which of them are special: out of four files, with their ids.

tokenizer.json has its own list. tokenizer_config.json may list tokens with ids and flags
(`added_tokens_decoder`), added_tokens.json tokens with ids alone. Both files and special_tokens_map.json name
special tokens (`eos_token`, `additional_special_tokens`, ...). A token is special where one of them says so:
text that holds it is never cut there, and decoded text leaves it out. Ids may have gaps; an id that two files
give differently is an error. A special token that no file gives an id stays plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from blockbatch.models.json_file import read_optional_json
from blockbatch.models.spec import CheckpointError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class Token:
    """One added token.

    Attributes:
        content: its text.
        id: its id.
        special: whether decoded text leaves it out.
        lstrip, rstrip: whether it takes the white space before and behind it along.
        single_word: whether it counts between words alone, not inside of one.
        normalized: whether it is looked for in the normalised text; None: where it is not special.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None

    def added(self) -> tokenizers.AddedToken:
        """The token as the tokenizers library has it."""
        flags = {name: getattr(self, name) for name in _FLAGS[:3]}
        normalized = not self.special if self.normalized is None else self.normalized
        return tokenizers.AddedToken(self.content, special=self.special, normalized=normalized, **flags)


def read_tokens(
    folder: Path, settings: Mapping[str, Any], own: Iterable[Token], vocabulary: Mapping[str, int]
) -> list[Token]:
    """All added tokens of a folder, ascending by id.

    Args:
        settings: the content of tokenizer_config.json.
        own: tokens of tokenizer.json.
        vocabulary: ids of the tokens that text is merged to.

    Raises:
        CheckpointError: naming the file, the token, the id that was expected and the one that came.
    """
    tokens = {token.content: token for token in own}
    listed = settings.get("added_tokens_decoder") or {}
    for token in _listed(folder / "tokenizer_config.json", listed):
        known = tokens.get(token.content)
        _same_id(folder / "tokenizer_config.json", token, known.id if known else None)
        tokens[token.content] = replace(token, special=token.special or bool(known and known.special))
    path = folder / "added_tokens.json"
    for content, token_id in read_optional_json(path).items():
        if not content or isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"{path}: expected {{token: id}}, got {content!r}: {token_id!r}")
        known = tokens.setdefault(content, Token(content, token_id))
        _same_id(path, Token(content, token_id), known.id)
    for content, flags in _special(folder, settings):
        token_id = tokens[content].id if content in tokens else vocabulary.get(content)
        if token_id is not None:
            known = tokens.get(content) or Token(content, token_id, **flags)
            tokens[content] = replace(known, special=True)
    _check_ids(folder, tokens.values(), vocabulary)
    return sorted(tokens.values(), key=lambda token: token.id)


def read_own(path: Path, listed: Any) -> list[Token]:
    """The tokens of a tokenizer.json's `added_tokens`."""
    if not isinstance(listed, list):
        raise CheckpointError(f"{path}: added_tokens: expected a list, got {listed!r:.80}")
    return [_token(path, fields.get("id") if isinstance(fields, dict) else None, fields) for fields in listed]


def holds(backend: tokenizers.Tokenizer, tokens: Iterable[Token]) -> bool:
    """Whether a tokenizer has exactly these added tokens, at their ids and with their flags."""
    have = {token_id: repr(token) for token_id, token in backend.get_added_tokens_decoder().items()}
    return have == {token.id: repr(token.added()) for token in tokens}


def outside(tokens: Iterable[Token], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokens that the vocabulary lacks; the library numbers them itself unless it holds them."""
    return {token.content: token.id for token in tokens if token.content not in vocabulary}


def fields_of(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Tokens as entries of a tokenizer.json's `added_tokens`."""
    entries = []
    for token in tokens:
        added = token.added()
        flags = {name: getattr(added, name) for name in _FLAGS}
        entries.append({"id": token.id, "content": token.content, **flags, "special": token.special})
    return entries


def named_token(settings: Mapping[str, Any], folder: Path, key: str) -> Any:
    """A special token such as "eos_token", of tokenizer_config.json or else of special_tokens_map.json."""
    for source in (settings, read_optional_json(folder / "special_tokens_map.json")):
        value = source.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            return value
    return None


def _listed(path: Path, listed: Any) -> list[Token]:
    where = f"{path}: added_tokens_decoder"
    if not isinstance(listed, dict):
        raise CheckpointError(f"{where}: expected {{id: {{content, ...}}}}, got {listed!r:.80}")
    tokens: dict[str, Token] = {}
    for key, fields in listed.items():
        token = _token(where, int(key) if key.isascii() and key.isdecimal() else None, fields)
        _same_id(path, token, tokens.setdefault(token.content, token).id)
    return list(tokens.values())


def _token(where: Path | str, token_id: Any, fields: Any) -> Token:
    content = fields.get("content") if isinstance(fields, dict) else None
    valid = isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0
    if not valid or not isinstance(content, str) or not content:
        raise CheckpointError(
            f"{where}: expected {{id: {{content, ...}}}}, got {fields!r:.120} at id {token_id!r}"
        )
    flags = {name: fields.get(name) for name in (*_FLAGS, "special")}
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} of {content!r} must be true or false, got {value!r}")
    normalized = flags.pop("normalized")
    return Token(content, token_id, normalized=normalized, **{name: bool(flags[name]) for name in flags})


def _special(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, bool]]]:
    """Contents and flags of all tokens that are named special."""
    for source in (settings, read_optional_json(folder / "special_tokens_map.json")):
        values = [source.get(key) for key in _NAMED]
        for key in _LISTS:
            more = source.get(key)
            values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        for value in values:
            fields = value if isinstance(value, dict) else {"content": value}
            if isinstance(fields.get("content"), str) and fields["content"]:
                flags = {name: fields[name] for name in _FLAGS if isinstance(fields.get(name), bool)}
                yield fields["content"], flags


def _same_id(path: Path, token: Token, known: int | None) -> None:
    if known is not None and known != token.id:
        raise CheckpointError(f"{path}: expected {token.content!r} at id {token.id}, got id {known}")


def _check_ids(folder: Path, tokens: Iterable[Token], vocabulary: Mapping[str, int]) -> None:
    """No token at two ids, no id for two tokens."""
    holders = {token_id: content for content, token_id in vocabulary.items()}
    for token in tokens:
        _same_id(folder, token, vocabulary.get(token.content))
        holder = holders.setdefault(token.id, token.content)
        if holder != token.content:
            raise CheckpointError(
                f"{folder}: expected {token.content!r} at id {token.id}, which is the id of {holder!r}"
            )
