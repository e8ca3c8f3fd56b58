"""Where the cluster's secret lies while it runs: in Ray's key-value store, from which each process takes it itself.

Not in the environment (children inherit it, /proc shows it), not in runtime_env or actor arguments (Ray's dashboard,
state API and worker command lines show those). Who can read the store can run code as this user on Ray anyway.
"""

from __future__ import annotations

import os
from typing import Protocol

from diptych.cluster.config import SecuritySettings
from diptych.cluster.security import read_secret
from diptych.protos.errors import StartupError
from diptych.protos.trust import SECRET_BYTES, secret_id

_KEY = "secret"


class SecretStore(Protocol):
    """What GcsStore offers."""

    def get(self, key: str) -> bytes | None:
        """The value, or None."""

    def put(self, key: str, value: bytes) -> None:
        """Durable when it returns."""

    def put_new(self, key: str, value: bytes) -> None:
        """The same unless there is a value."""

    def delete(self, key: str) -> None:
        """Forget."""


def deposit(store: SecretStore, security: SecuritySettings) -> str:
    """Make the secret, or take it from its file; the id that tells it from others.

    A cluster whose engines live keeps the secret it has, unless a file says otherwise. Raises StartupError.
    """
    if security.secret_file is not None:
        store.put(_KEY, read_secret(security.secret_file))
    else:
        store.put_new(_KEY, os.urandom(SECRET_BYTES))
    return secret_id(fetch(store))


def fetch(store: SecretStore) -> bytes:
    """For a process of the cluster. Raises StartupError where no cluster has been started."""
    secret = store.get(_KEY)
    if secret is None or len(secret) != SECRET_BYTES:
        raise StartupError("this Ray cluster holds no secret of a Diptych cluster: start that first")
    return secret


def withdraw(store: SecretStore) -> None:
    """The cluster has ended."""
    store.delete(_KEY)
