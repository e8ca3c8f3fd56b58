"""The files behind `security:`: reads them, checks them before anything starts, and makes a process's Trust of them.

Called by control/ (checks, secret), engine/ and the router's entry (trust). Knows no Ray; where the secret lies while a
cluster runs is control/keyring.py's business.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from diptych.protos.errors import StartupError
from diptych.protos.trust import CERTIFICATE_SUFFIX, ROUTER, TlsIdentity, Trust
from diptych.protos.types import Role

from .config import DiptychConfig, SecuritySettings, TlsSettings

MAX_FILE_BYTES = 1 << 20
_SECRET = re.compile(rb"[0-9a-fA-F]{64}\s*")


def engine_name(roles: Iterable[Role]) -> str:
    """How an engine with these roles names itself to its peers."""
    return "-".join(sorted(role.value for role in roles))


def names_of(config: DiptychConfig) -> list[str]:
    """The names of all processes that a configuration starts."""
    roles = {role.value for settings in config.models.values() for role in settings.pools()}
    return [ROUTER, *sorted(roles)]


def trust_of(security: SecuritySettings, secret: bytes, name: str) -> Trust:
    """What the process `name` (ROUTER, or `engine_name`) proves and believes. Raises StartupError for a bad file."""
    tls = None if security.tls is None else _identity(security.tls, name)
    return Trust(secret, name, tls=tls, allow_plaintext=security.allow_plaintext)


def read_secret(file: Path) -> bytes:
    """The 32 bytes that a secret file means. Raises StartupError."""
    text = read_file("security.secret_file", file, is_private=True)
    if not _SECRET.fullmatch(text):
        raise StartupError(
            f"security.secret_file: {file} does not hold 64 hexadecimal digits and nothing else; make it with "
            f"`(umask 077; openssl rand -hex 32 > {file})`"
        )
    return bytes.fromhex(text.decode())


def check_security(security: SecuritySettings, names: Collection[str]) -> None:
    """Try every certificate on every other one, in memory. Raises StartupError with the file to blame."""
    if security.secret_file is not None:
        read_secret(security.secret_file)
    if security.api_keys is not None:
        from .key_file import read_keys

        read_keys(security.api_keys)
    if security.tls is None:
        return
    tls = security.tls
    shown = {name: _shake_hands(tls, _identity(tls, name), name) for name in names}
    for name, hosts in shown.items():
        wanted = {role + CERTIFICATE_SUFFIX for role in name.split("-")}
        if missing := sorted(wanted - hosts):
            raise StartupError(
                f"security.tls.cert: {_file(tls.cert, name)} is not a certificate for {', '.join(missing)}, the name "
                f"that a {name} shows (subjectAltName, DNS); it has {', '.join(sorted(hosts)) or 'no name'}"
            )


def _identity(tls: TlsSettings, name: str) -> TlsIdentity:
    return TlsIdentity(
        ca=read_file("security.tls.ca", _file(tls.ca, name)),
        cert=read_file("security.tls.cert", _file(tls.cert, name)),
        key=read_file("security.tls.key", _file(tls.key, name), is_private=True),
    )


def _file(template: Path, name: str) -> Path:
    return Path(str(template).replace("{role}", name))


def read_file(key: str, file: Path, *, is_private: bool = False) -> bytes:
    """What a file of `security:` holds; `key` is the one that names it. Raises StartupError."""
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())  # of what is read, not of what lies there a moment later
            if is_private and (words := why_exposed(found.st_mode, found.st_uid, os.geteuid())):
                raise StartupError(f"{key}: {file} {words}")
            text = opened.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise StartupError(f"{key}: cannot read {file}: {exc.strerror or exc}") from exc
    if len(text) > MAX_FILE_BYTES:
        raise StartupError(f"{key}: {file} is larger than {MAX_FILE_BYTES} bytes and so not what belongs there")
    return text


def why_exposed(mode: int, owner: int, me: int) -> str | None:
    """Why a file with these permissions is no secret of user `me`, in words, or None."""
    if owner not in (me, 0):
        return f"belongs to user {owner}, who may change it; it must be yours"
    # What root hands to one group only is how Kubernetes mounts a secret for a process that is not root.
    readable = stat.S_IRWXO | (stat.S_IRWXG if owner == me else stat.S_IWGRP)
    if mode & readable:
        return f"can be read by other users (mode {stat.S_IMODE(mode):03o}); run `chmod 600` on it"
    return None


def _shake_hands(tls: TlsSettings, own: TlsIdentity, name: str) -> set[str]:
    """The DNS names in a certificate that its own authority vouches for and whose key is there."""
    cert, key, ca = (_file(template, name) for template in (tls.cert, tls.key, tls.ca))
    try:
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False  # the names are compared by the caller, who can say which one is missing
        for context in (server, client):
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=own.ca.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as exc:
        raise StartupError(f"security.tls.ca: {ca} holds no certificates in PEM form: {_word(exc)}") from exc
    try:
        for context in (server, client):
            context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as exc:
        raise StartupError(
            f"security.tls.key: {key} is not the private key of {cert}, or one of them is not in PEM form: {_word(exc)}"
        ) from exc
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server)
    try:
        for side in (other, one, other, one):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError as exc:
        raise StartupError(f"security.tls.cert: {cert} is not vouched for by {ca}, now: {_word(exc)}") from exc
    found: dict[str, Any] = one.getpeercert() or {}
    return {name for kind, name in found.get("subjectAltName", ()) if kind == "DNS"}


def _no_password() -> str:
    raise ValueError("the key is locked with a password")


def _word(exc: BaseException) -> str:
    reason = getattr(exc, "verify_message", "") or getattr(exc, "reason", "") or str(exc)
    return str(reason).replace("_", " ").lower()
