"""The branch `security:` of diptych.yaml; security.py reads the files that it names."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator

from diptych.protos.settings import Settings

API_PLAINTEXT = "keys, prompts and answers leave this machine unencrypted: router.host is off loopback"


class TlsSettings(Settings):
    """PEM files for mutual TLS on every gRPC channel. `{role}` in a path stands for the role of who reads it."""

    ca: Path = Field(description="certificates of the cluster's own authority")
    cert: Path = Field(description="certificate for router.diptych.internal, prefill... or decode...; may hold {role}")
    key: Path = Field(description="its private key, readable by nobody else; may hold {role}")

    @field_validator("ca", "cert", "key")
    @classmethod
    def _absolute(cls, file: Path) -> Path:
        return Path(os.path.abspath(file.expanduser()))


class SecuritySettings(Settings):
    """Who may call the API: holders of a key. Who may call engines: holders of the cluster's secret, over TLS whose
    certificates name their role.
    """

    api_keys: Path | None = Field(
        None,
        description="file of `diptych keys create --file`: keys that open the API beside those of the store, by "
        "their hashes; where both hold none, no key is asked for",
    )
    secret_file: Path | None = Field(
        None, description="64 hexadecimal digits, readable by nobody else; null: a fresh secret for this cluster"
    )
    tls: TlsSettings | None = Field(
        None, description="PEM files of mutual TLS; `{role}` in a path is router, prefill or decode; null: no TLS"
    )
    allow_plaintext: bool = Field(
        False, description="let channels leave this machine without TLS; only where the network itself is trusted"
    )

    @field_validator("secret_file", "api_keys")
    @classmethod
    def _absolute(cls, file: Path | None) -> Path | None:
        return None if file is None else Path(os.path.abspath(file.expanduser()))
