"""Amazon's signatures (SigV4), by botocore, with whatever credentials it finds; or Bedrock's own keys, as they are.

Credentials that end are renewed in a thread. Nothing but signing is left to botocore.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .auth import KeyAuth, Sending, Shown, key_id_of, refused
from .provider import Provider
from .secrets import KeyReader, Secret


class AwsAuth:
    """`provider.key` leads to a Bedrock API key; where there is none, requests are signed."""

    def __init__(self, provider: Provider, keys: KeyReader) -> None:
        self._provider = provider
        self._keys = keys
        self._bearer = KeyAuth(provider, keys)
        self._credentials: Any = None
        self._lock = asyncio.Lock()

    async def show(self, sending: Sending) -> Shown:
        """See Auth."""
        if self._bearer.try_secret() is not None:
            return await self._bearer.show(sending)
        async with self._lock:
            frozen = await asyncio.to_thread(self._frozen) if self._must_wait() else self._credentials
            frozen = frozen.get_frozen_credentials() if hasattr(frozen, "get_frozen_credentials") else frozen
        return self._signed(sending, frozen)

    def key_id(self) -> str:
        """See Auth."""
        if self._bearer.key_id():
            return self._bearer.key_id()
        return key_id_of(Secret(self._keys.environ.get("AWS_ACCESS_KEY_ID") or "default"))

    def _must_wait(self) -> bool:
        """Whether the network or the disk may be asked: at first, and for credentials that are about to end."""
        credentials = self._credentials
        return credentials is None or (hasattr(credentials, "refresh_needed") and credentials.refresh_needed())

    def _frozen(self) -> Any:
        try:
            import botocore.exceptions
            import botocore.session
        except ImportError:
            raise refused(
                f"{self._provider.name} needs the package botocore to sign requests: pip install 'diptych[aws]', or "
                "set $AWS_BEARER_TOKEN_BEDROCK to a Bedrock API key"
            ) from None
        try:
            if self._credentials is None:
                self._credentials = botocore.session.Session().get_credentials()
            if self._credentials is not None:
                return self._credentials.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as exc:
            raise refused(f"{self._provider.name}: AWS gave no credentials ({type(exc).__name__})") from None
        raise refused(
            f"{self._provider.name} needs AWS credentials: set $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, run "
            "`aws configure`, or set $AWS_BEARER_TOKEN_BEDROCK to a Bedrock API key; without any key, start "
            "`ollama serve` and use ollama/MODEL, or serve an own pool and use pool/MODEL"
        )

    def _signed(self, sending: Sending, frozen: Any) -> Shown:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        covered = {name: sending.headers[name] for name in ("host", "content-type") if name in sending.headers}
        request = AWSRequest(method="POST", url=sending.url, data=sending.body, headers=covered)
        SigV4Auth(frozen, self._provider.service, self._provider.region).add_auth(request)
        signed = {name.lower(): value for name, value in request.headers.items() if name.lower() not in covered}
        secrets = [Secret(text) for text in (frozen.secret_key, frozen.token, frozen.access_key) if text]
        return Shown(signed, secrets=tuple(secrets))
