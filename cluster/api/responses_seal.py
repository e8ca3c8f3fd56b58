"""Reasoning in a form that only the routers of one store can read, and of one tenant alone: `encrypted_content`.

AES-GCM with a key from the store; the tenant is authenticated with the text. Called by responses.py.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_VERSION: Final = b"\x01"


class Seal:
    """Of one tenant."""

    def __init__(self, key: bytes, tenant: str) -> None:
        self._cipher = AESGCM(key)
        self._tenant = b"reasoning of " + tenant.encode()

    def close(self, text: str) -> str:
        """Never twice the same for one text."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, text.encode(), self._tenant)
        return base64.urlsafe_b64encode(_VERSION + nonce + sealed).decode()

    def open(self, sealed: str) -> str | None:
        """None: it is not ours, another tenant's, or altered."""
        try:
            raw = base64.b64decode(sealed.encode("ascii"), altchars=b"-_", validate=True)
            nonce, rest = raw[1 : 1 + _NONCE_BYTES], raw[1 + _NONCE_BYTES :]
            if raw[:1] != _VERSION or len(nonce) < _NONCE_BYTES:
                return None
            return self._cipher.decrypt(nonce, rest, self._tenant).decode()
        except (binascii.Error, InvalidTag, UnicodeError, ValueError):
            return None
