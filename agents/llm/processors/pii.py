"""Addresses, numbers and accounts of people, taken out of what a model is told; on request put back into its answers.

Each kind is looked for by plain scanning with its own check (Luhn, the check digits of IBANs, ranges), in linear time.
Names and postal addresses have no form, and are not found: give an own Processor with a model for them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from diptych.protos.messages import Message

from ..errors import DefinitionError
from .processor import Processor, ProcessorContext, with_texts
from .spans import Span, replaced

Kind = Literal["email", "phone", "card", "iban", "ip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LOCAL = frozenset("._%+-'")
# Characters of an IBAN by its country (ISO 13616).
_IBANS: Mapping[str, int] = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        33: "LC RU",
    }.items()
    for country in countries.split()
}
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ A-Za-z0-9])")
_GROUPS = re.compile(r"[0-9]+")
_PHONE = re.compile(r"(?<![\w+])(?:\+|\()?[0-9][0-9 ()./\-]{5,24}[0-9](?![\w])")
_NORTH_AMERICAN = re.compile(r"(?:1[ .\-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .\-])[2-9][0-9]{2}[ .\-][0-9]{4}")
_IP4 = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w]|\.[0-9])")
_IP6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}(?![\w:])")
_PLACEHOLDER = re.compile(r"\[(?:EMAIL|PHONE|CARD|IBAN|IP)_[0-9]{1,9}\]")


class RedactPII(Processor):
    """Each place of one of `kinds` becomes [EMAIL], [PHONE], [CARD], [IBAN] or [IP]. With `restore` equal ones get
    equal numbers, [EMAIL_1], and stand again in place of them in answers and in arguments of tools; the run's state
    then holds them, so keep it as you keep them.
    """

    def __init__(self, kinds: Sequence[Kind] = KINDS, *, restore: bool = False) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise DefinitionError(f"RedactPII(kinds=...): there is no kind {kind!r}; there are {', '.join(KINDS)}")
        self.kinds = tuple(kinds)
        self.restore = restore

    def before(self, messages: Sequence[Message], ctx: ProcessorContext) -> Sequence[Message]:
        """Redacted, arguments of calls in an earlier conversation included."""
        return [with_texts(message, lambda text: self.redacted(text, ctx.notes), calls=True) for message in messages]

    def after(self, message: Message, ctx: ProcessorContext) -> Message:
        """With `restore`: what was taken out, back in its places; else redacted."""
        if not self.restore:
            return with_texts(message, lambda text: self.redacted(text, {}), thoughts=True)
        return with_texts(message, lambda text: restored(text, ctx.notes), calls=True, thoughts=True)

    def redacted(self, text: str, notes: dict[str, Any] | None = None) -> str:
        """One text; `notes` collects what stood there."""
        notes = {} if notes is None else notes
        known: dict[str, str] = notes.setdefault("placeholders", {})  # what stood there, to its placeholder
        counts: dict[str, int] = notes.setdefault("counts", {})
        written = set(_PLACEHOLDER.findall(text)) if self.restore else set()  # the writer's own words

        def placeholder(span: Span) -> str:
            name = span.kind.upper()
            if not self.restore:
                return f"[{name}]"
            found = text[span.begin : span.end]
            while found not in known:
                counts[name] = counts.get(name, 0) + 1
                if (one := f"[{name}_{counts[name]}]") not in written:
                    known[found] = one
            return known[found]

        return replaced(text, pii_of(text, self.kinds), placeholder)


def restored(text: str, notes: Mapping[str, Any]) -> str:
    """`text` with what stood in the places of its placeholders."""
    known = {placeholder: found for found, placeholder in notes.get("placeholders", {}).items()}
    return _PLACEHOLDER.sub(lambda match: known.get(match.group(), match.group()), text) if known else text


def pii_of(text: str, kinds: Sequence[Kind] = KINDS) -> list[Span]:
    """Where they stand in a text; what is found first, in the order of the table, keeps its place."""
    found: list[Span] = []
    taken: set[int] = set()
    for kind, scan in _SCANS.items():
        if kind not in kinds:
            continue
        for begin, end in scan(text):
            if begin in taken or end - 1 in taken:
                continue
            taken.update(range(begin, end))
            found.append(Span(begin, end, kind))
    return found


def _emails(text: str) -> Iterator[tuple[int, int]]:
    at = -1
    while (at := text.find("@", at + 1)) >= 0:
        begin = at
        while begin > 0 and at - begin < 64 and (text[begin - 1].isalnum() or text[begin - 1] in _LOCAL):
            begin -= 1
        if begin >= 1 and text[begin - 1] == "\\" and text[begin] in "nrt":  # in JSON: the letter of an escape
            begin += 1
        begin += _num_leading(text, begin, at, ".'-")
        end = at + 1
        while end < len(text) and end - at <= 253 and (text[end].isalnum() or text[end] in ".-"):
            end += 1
        while end > at and text[end - 1] in ".-":
            end -= 1
        labels = text[at + 1 : end].split(".")
        if begin < at and len(labels) > 1 and all(labels) and len(labels[-1]) > 1 and not labels[-1].isdigit():
            yield begin, end


def _num_leading(text: str, begin: int, end: int, letters: str) -> int:
    at = begin
    while at < end and text[at] in letters:
        at += 1
    return at - begin


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        length = _IBANS.get(match.group()[:2].upper())
        if length is None:
            continue
        letters: list[str] = []
        end = match.start()
        while end < len(text) and len(letters) < length:
            if text[end] == " " and letters and text[end - 1] != " ":
                end += 1
                continue
            if not (text[end].isascii() and text[end].isalnum()):
                break
            letters.append(text[end].upper())
            end += 1
        is_whole = end == len(text) or not (text[end].isascii() and text[end].isalnum())
        if len(letters) == length and is_whole and _is_iban("".join(letters)):
            yield match.start(), end


def _is_iban(letters: str) -> bool:
    turned = letters[4:] + letters[:4]
    return int("".join(str(int(letter, 36)) for letter in turned)) % 97 == 1


def _cards(text: str) -> Iterator[tuple[int, int]]:
    """13 to 19 digits, in groups or not, whose last is the check digit of the others."""
    groups = [match.span() for match in _GROUPS.finditer(text)]
    at = 0
    while at < len(groups):
        end = _card_from(text, groups, at)
        if end is None:
            at += 1
        else:
            yield groups[at][0], groups[end][1]
            at = end + 1


def _card_from(text: str, groups: list[tuple[int, int]], at: int) -> int | None:
    digits = ""
    for last in range(at, min(at + 8, len(groups))):
        begin, end = groups[last]
        if last > at and text[groups[last - 1][1] : begin] not in (" ", "-"):
            return None
        if len(digits) + end - begin > 19:
            return None
        digits += text[begin:end]
        if len(digits) >= 13 and digits[0] in "23456" and len(set(digits)) > 1 and _is_luhn(digits):
            return last
    return None


def _is_luhn(digits: str) -> bool:
    total = 0
    for at, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + at % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in _PHONE.finditer(text):
        found = match.group()
        num_digits = sum(letter.isdigit() for letter in found)
        is_abroad = found[0] == "+" or found.startswith("00")
        is_trunk = found[0] == "0" or found.startswith("(0")
        is_phone = (
            (is_abroad and 8 <= num_digits <= 15)
            or (is_trunk and 9 <= num_digits <= 12)
            or _NORTH_AMERICAN.fullmatch(found) is not None
        )
        if is_phone:
            yield match.span()


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_IP6, _IP4):
        for match in pattern.finditer(text):
            found = match.group()
            if pattern is _IP6 and (found.count(":") < 2 or not any(letter.isdigit() for letter in found)):
                continue
            try:
                ipaddress.ip_address(found)
            except ValueError:
                continue
            yield match.span()


_SCANS: Mapping[Kind, Callable[[str], Iterator[tuple[int, int]]]] = {
    "iban": _ibans,
    "card": _cards,
    "ip": _addresses,
    "email": _emails,
    "phone": _phones,
}
