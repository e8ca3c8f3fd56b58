"""Keys, tokens and passwords, taken out of what a model is told and of what it says.

By their forms: prefixes of well-known issuers, JSON web tokens, PEM private keys, credentials in addresses, and values
of names such as `password`. In linear time, whatever the text holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from diptych.protos.messages import Message

from .processor import Processor, ProcessorContext, with_texts
from .spans import Span, replaced

# Prefix, and how many characters of letters, digits, _ and - must follow at least.
PREFIXES: tuple[tuple[str, int], ...] = (
    ("sk-", 20),
    ("sk_live_", 16),
    ("sk_test_", 16),
    ("rk_live_", 16),
    ("rk_test_", 16),
    ("whsec_", 16),
    ("ghp_", 30),
    ("gho_", 30),
    ("ghu_", 30),
    ("ghs_", 30),
    ("ghr_", 30),
    ("github_pat_", 30),
    ("glpat-", 16),
    ("xoxb-", 16),
    ("xoxp-", 16),
    ("xoxa-", 16),
    ("xapp-", 16),
    ("AIza", 30),
    ("ya29.", 20),
    ("GOCSPX-", 20),
    ("hf_", 30),
    ("gsk_", 30),
    ("xai-", 30),
    ("pplx-", 30),
    ("r8_", 30),
    ("npm_", 30),
    ("pypi-", 40),
    ("dop_v1_", 40),
    ("shpat_", 30),
    ("SG.", 30),
    ("dapi", 30),
    ("dk_", 24),
    ("AKIA", 16),
    ("ASIA", 16),
)
_BY_LETTER: dict[str, list[tuple[str, int]]] = {}
for _prefix, _least in PREFIXES:
    _BY_LETTER.setdefault(_prefix[0], []).append((_prefix, _least))
_RUN = re.compile(r"[A-Za-z0-9_.\-]{16,}")
_NAMED = re.compile(
    r"""(?i)(?:password|passwd|passphrase|pwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|secret[_-]?key"""
    r"""|client[_-]?secret|(?:access|auth|refresh|bearer)[_-]?token)[\\"']{0,2}[ ]{0,3}[:=][ ]{0,3}[\\"']{0,2}"""
    r"""([^\s"'\\,;&<>]{4,})"""
)
_BEARER = re.compile(r"(?i)\b(?:bearer|basic) {1,3}([A-Za-z0-9._~+/\-]{16,}={0,2})")
_ADDRESS = re.compile(r"://[^\s/:@]{0,128}:([^\s/@]{1,256})@")
_PEM_BEGIN, _PEM_END, _DASHES = "-----BEGIN ", "-----END ", "-----"


class RedactSecrets(Processor):
    """Each secret becomes `placeholder`. Arguments of the model's calls stay as they are: tools may need them."""

    def __init__(self, placeholder: str = "[secret]") -> None:
        self.placeholder = placeholder

    def before(self, messages: Sequence[Message], ctx: ProcessorContext) -> Sequence[Message]:
        """Without secrets."""
        return [with_texts(message, self.redacted, calls=True) for message in messages]

    def after(self, message: Message, ctx: ProcessorContext) -> Message:
        """Without secrets, its reasoning included."""
        return with_texts(message, self.redacted, thoughts=True)

    def redacted(self, text: str) -> str:
        """One text."""
        return replaced(text, secrets_of(text), lambda span: self.placeholder)


def secrets_of(text: str) -> list[Span]:
    """Where secrets stand in a text."""
    found = list(_pem(text))
    found += [Span(*match.span(1), "named") for match in _NAMED.finditer(text)]
    found += [Span(*match.span(1), "bearer") for match in _BEARER.finditer(text) if _is_random(match.group(1))]
    if "://" in text:
        found += [Span(*match.span(1), "address") for match in _ADDRESS.finditer(text)]
    for run in _RUN.finditer(text):
        is_escape = text[run.start() - 1 : run.start()] == "\\"  # in JSON: a newline's n, not the token's
        found += _tokens(run.group()[is_escape:], run.start() + is_escape)
    return found


def _tokens(run: str, at: int) -> Iterator[Span]:
    run = run.rstrip(".-")
    if run.startswith("eyJ") and run.count(".") == 2 and all(len(part) >= 4 for part in run.split(".")):
        yield Span(at, at + len(run), "jwt")
        return
    for prefix, least in _BY_LETTER.get(run[0], ()):
        if run.startswith(prefix) and len(run) - len(prefix) >= least and _is_random(run[len(prefix) :]):
            yield Span(at, at + len(run), "token")
            return


def _is_random(text: str) -> bool:
    """A name of words, such as sk-learn-compatible-estimators, has no digits; a token without any is hardly made."""
    return any(letter.isdigit() for letter in text)


def _pem(text: str) -> Iterator[Span]:
    at = 0
    while (begin := text.find(_PEM_BEGIN, at)) >= 0:
        head = text.find(_DASHES, begin + len(_PEM_BEGIN), begin + 80)
        at = begin + len(_PEM_BEGIN)
        if head < 0 or "PRIVATE KEY" not in text[begin:head]:
            continue
        end = text.find(_PEM_END, head)
        tail = -1 if end < 0 else text.find(_DASHES, end + len(_PEM_END), end + 80)
        at = tail + len(_DASHES) if tail >= 0 else len(text)  # one that was cut off is secret to its end
        yield Span(begin, at, "pem")
