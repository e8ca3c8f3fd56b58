"""Unicode and length of what goes to a model: one form of each character, none that cannot be seen, not too long."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from diptych.protos.messages import Message

from ..errors import DefinitionError
from .processor import Processor, ProcessorContext, with_texts

Form = Literal["NFC", "NFKC", "NFD", "NFKD"]
_MOST_MARKS = 30  # on one letter, as Unicode's stream-safe text has it: longer runs are sorted in quadratic time
# Characters that show nothing and change what is read: controls, marks of direction, tags, joiners of nothing. The
# joiners that writing systems and emoji need (U+200C, U+200D) stay.
_UNSEEN = {
    **dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)]),
    **dict.fromkeys([0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF]),
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2060, 0x2070)]),
    **dict.fromkeys(range(0xE0000, 0xE0080)),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}
for _kept in "\n\t":
    del _UNSEEN[ord(_kept)]
_TO_SORT = re.compile(r"[\ud800-\udfff\x00-\x08\x0b-\x1f\x7f-\U0010ffff]")


class Normalise(Processor):
    """`form`: how letters with marks are written. `controls`: whether characters that cannot be seen are taken out.
    `most_chars`: of all that is new in one pass; what is longer is cut, or with over="block" ends the run.
    """

    def __init__(
        self,
        form: Form = "NFC",
        *,
        most_chars: int | None = None,
        controls: bool = True,
        over: Literal["cut", "block"] = "cut",
    ) -> None:
        if form not in ("NFC", "NFKC", "NFD", "NFKD"):
            raise DefinitionError(f"Normalise(form=...) is NFC, NFKC, NFD or NFKD, not {form!r}")
        if over not in ("cut", "block"):
            raise DefinitionError(f"Normalise(over=...) is cut or block, not {over!r}")
        if most_chars is not None and most_chars < 1:
            raise DefinitionError(f"Normalise(most_chars=...) is at least 1, not {most_chars}")
        self.form = form
        self.most_chars = most_chars
        self.controls = controls
        self.over = over

    def before(self, messages: Sequence[Message], ctx: ProcessorContext) -> Sequence[Message]:
        """Normalised and bounded, over all of the messages together."""
        left = self.most_chars
        found = []
        for message in messages:

            def bounded(text: str) -> str:
                nonlocal left
                text = self.normal(text)
                if left is None:
                    return text
                if len(text) > left and self.over == "block":
                    ctx.block(f"it is longer than {self.most_chars} characters")
                text = text[:left]
                left -= len(text)
                return text

            found.append(with_texts(message, bounded, calls=False))
        return found

    def after(self, message: Message, ctx: ProcessorContext) -> Message:
        """Normalised; the length is the model's own affair."""
        return with_texts(message, self.normal, thoughts=True)

    def normal(self, text: str) -> str:
        """One text, in linear time."""
        if self.controls and _TO_SORT.search(text):
            text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_UNSEEN)
        if text.isascii():
            return text
        return unicodedata.normalize(self.form, _stream_safe(text))


def _stream_safe(text: str) -> str:
    marks = "".join(sorted(letter for letter in set(text) if unicodedata.combining(letter)))
    if not marks:
        return text
    one = f"[{re.escape(marks)}]"
    return re.sub(f"({one}{{{_MOST_MARKS}}}){one}+", r"\1", text)
