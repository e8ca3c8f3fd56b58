"""Keys of providers: where they are kept, how they are read when they are used, and how they are kept out of texts.

A configuration holds references (`env:NAME`, `file:/path`), never keys. Nothing here knows what a key opens.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NoReturn
from urllib.parse import quote

MAX_KEY_BYTES: Final = 16 << 10
HIDDEN: Final = "[hidden]"
_GRAM = 8  # so many characters of a key in a row are taken for a piece of it
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PIECE = "[A-Za-z0-9_.*+/=~-]"  # what goes on in the word that holds a piece of a key
_KEY_LIKE = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|gsk|xai|nvapi|hf|pplx|csk|fw|ghp|github_pat|tgp|dapi|AIza|AKIA|ASIA|ya29)"
    r"[-_.A-Za-z0-9*]{12,}|Bearer\s+[^\s\"',;]{4,})"
)


class Secret:
    """A key that shows itself in no text: neither printed, nor formatted, nor in JSON, nor in a pickle."""

    __slots__ = ("_pieces", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        self._pieces: tuple[frozenset[str], frozenset[str]] | None = None

    def reveal(self) -> str:
        """The key, for the one place that sends it."""
        return self._value

    def pieces(self) -> tuple[frozenset[str], frozenset[str]]:
        """For `redacted`: what stands in a row in the key, as it is or as a header or an address writes it, so many
        characters and half as many; made once, because every answer is looked through for them.
        """
        if self._pieces is None:
            forms = {self._value, quote(self._value, safe=""), base64.b64encode(self._value.encode()).decode()}
            self._pieces = _rows(forms, _GRAM), _rows(forms, _GRAM // 2)
        return self._pieces

    def __repr__(self) -> str:
        return f"Secret({HIDDEN})"

    def __str__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return HIDDEN

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key does not leave its process; send the reference to it")


def _rows(forms: Iterable[str], size: int) -> frozenset[str]:
    return frozenset(form[at : at + size] for form in forms for at in range(len(form) - size + 1))


class KeyUnreadable(ValueError):
    """A reference leads to no usable key; the message says where it leads, never what is there."""


@dataclass(frozen=True, slots=True)
class KeyReference:
    """Where a key is: in the first of the environment's variables `place` that is set (separated by `|`), in the file
    `place`, or nowhere, because none is needed.
    """

    kind: Literal["env", "file", "none"]
    place: str = ""

    @classmethod
    def parse(cls, text: object) -> KeyReference:
        """`env:NAME`, `file:/path` or `none`. Raises ValueError, which does not repeat what might be a key."""
        if isinstance(text, str):
            kind, _, place = text.partition(":")
            if text == "none":
                return cls("none")
            if kind == "env" and _NAME.fullmatch(place):
                return cls("env", place)
            if kind == "file" and place and "\0" not in place:
                return cls("file", os.path.abspath(Path(place).expanduser()))
        raise ValueError(
            "should say where the key is: env:NAME, file:/path or none. A key itself does not belong in a configuration"
        )

    def __str__(self) -> str:
        if self.kind == "env":
            return " or ".join(f"${name}" for name in self.place.split("|"))
        return self.place if self.kind == "file" else "none"


NO_KEY: Final = KeyReference("none")


@dataclass(slots=True)
class KeyReader:
    """Reads the keys of one process. A file is read anew when it changes, a variable each time."""

    environ: Mapping[str, str] = field(repr=False)
    _files: dict[str, tuple[tuple[int, int, int], Secret]] = field(default_factory=dict, repr=False)
    _variables: dict[str, Secret] = field(default_factory=dict, repr=False)

    def read(self, reference: KeyReference) -> Secret | None:
        """The key; None where the reference is to none, a variable is not set or a file is not there. Raises
        KeyUnreadable.
        """
        match reference.kind:
            case "none":
                return None
            case "env":
                values = (self.environ.get(name, "").strip() for name in reference.place.split("|"))
                found = next(filter(None, values), "")
                return self._of_variable(reference, found) if found else None
            case "file":
                return self._of_file(reference.place)

    def _of_variable(self, reference: KeyReference, text: str) -> Secret:
        known = self._variables.get(reference.place)
        if known is None or known.reveal() != text:
            known = self._variables[reference.place] = _usable(text, str(reference))
        return known

    def _of_file(self, place: str) -> Secret | None:
        try:
            told = os.stat(place)
            mark = (told.st_mtime_ns, told.st_size, told.st_ino)
            known = self._files.get(place)
            if known is not None and known[0] == mark:
                return known[1]
            with open(place, "rb") as file:
                content = file.read(MAX_KEY_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise KeyUnreadable(f"the key's file {place} cannot be read: {exc.strerror or 'it is no file'}") from None
        secret = _usable(content.decode("latin-1").strip(), place)
        self._files[place] = (mark, secret)
        return secret


def _usable(text: str, place: str) -> Secret:
    if not text:
        raise KeyUnreadable(f"there is no key in {place}: it is empty")
    if len(text) > MAX_KEY_BYTES:
        raise KeyUnreadable(f"there is no key in {place}: it has more than {MAX_KEY_BYTES} bytes")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise KeyUnreadable(f"the key in {place} has spaces, line ends or letters that no header can carry")
    return Secret(text)


def redacted(text: str, secrets: Iterable[Secret] = ()) -> str:
    """`text` without the keys: neither whole, nor as a header or an address writes them, nor a piece of eight
    characters, with the word around it; nor anything else that looks like a key.
    """
    for secret in secrets:
        text = _without(text, secret)
    return _KEY_LIKE.sub(HIDDEN, text)


def _without(text: str, secret: Secret) -> str:
    key = secret.reveal()
    if len(key) < _GRAM:
        return text.replace(key, HIDDEN) if key else text
    grams, halves = secret.pieces()
    half = _GRAM // 2  # each piece has one whole half that begins at a multiple of half + 1
    if halves.isdisjoint([text[at : at + half] for at in range(0, len(text) - half + 1, half + 1)]):
        return text
    if not any(text[at : at + _GRAM] in grams for at in range(len(text) - _GRAM + 1)):
        return text
    marked = [False] * len(text)
    for at in range(len(text) - _GRAM + 1):
        if text[at : at + _GRAM] in grams:
            marked[at : at + _GRAM] = [True] * _GRAM
    word = re.compile(_PIECE)
    for order in (range(1, len(text)), range(len(text) - 2, -1, -1)):
        step = -1 if order.step == 1 else 1
        for at in order:
            marked[at] = marked[at] or (marked[at + step] and word.match(text[at]) is not None)
    pieces: list[str] = []
    for letter, hidden in zip(text, marked, strict=True):
        if not hidden:
            pieces.append(letter)
        elif not pieces or pieces[-1] != HIDDEN:
            pieces.append(HIDDEN)
    return "".join(pieces)


def plain(value: Any) -> Any:
    """For JSON: `default=plain` writes a key as nothing."""
    if isinstance(value, Secret):
        return HIDDEN
    raise TypeError(f"{type(value).__name__} is not JSON")
