"""Ray's global control store as a small key-value store: it outlives every actor, not the Ray cluster."""

from __future__ import annotations

from ray.experimental import internal_kv

NAMESPACE = "diptych"


class GcsStore:
    """manager.KeyValue and keyring.SecretStore. Needs a process that is connected to Ray."""

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        value: bytes | None = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Durable when it returns."""
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)

    def put_new(self, key: str, value: bytes) -> None:
        """The same unless there is a value."""
        internal_kv._internal_kv_put(key, value, overwrite=False, namespace=NAMESPACE)

    def delete(self, key: str) -> None:
        """Forget."""
        internal_kv._internal_kv_del(key, namespace=NAMESPACE)
