"""Google Cloud's tokens: of a service account's file, or of whatever this machine is logged in as. Needs google-auth.

Tokens are asked for in a thread, and again shortly before they end; several requests wait for one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from .auth import Sending, Shown, key_id_of, refused
from .provider import Provider
from .secrets import KeyReader, Secret

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_TIMEOUT_S = 10.0


class GoogleAuth:
    """A bearer token. `provider.key` leads to the path of a file of credentials: by the variable's value, or itself."""

    def __init__(self, provider: Provider, keys: KeyReader) -> None:
        self._provider = provider
        self._keys = keys
        self._credentials: Any = None
        self._origin = ""
        self._lock = asyncio.Lock()

    async def show(self, sending: Sending) -> Shown:
        """See Auth."""
        async with self._lock:
            origin = self._place()
            if self._credentials is None or origin != self._origin:
                self._credentials = await asyncio.to_thread(self._load, origin)
                self._origin = origin
            if not self._credentials.valid:
                await asyncio.to_thread(self._refresh, self._credentials)
            token = Secret(self._credentials.token)
        headers = {"authorization": f"Bearer {token.reveal()}"}
        project = getattr(self._credentials, "quota_project_id", None)
        return Shown(headers | ({"x-goog-user-project": project} if project else {}), secrets=(token,))

    def key_id(self) -> str:
        """See Auth: by whose credentials they are, not by the token, which changes every hour."""
        return key_id_of(Secret(self._place() or "default"))

    def _place(self) -> str:
        if self._provider.key.kind == "file":
            return self._provider.key.place
        names = self._provider.key.place.split("|") if self._provider.key.kind == "env" else []
        return next((value for name in names if (value := self._keys.environ.get(name, "").strip())), "")

    def _load(self, origin: str) -> Any:
        auth = self._library()
        try:
            return _of_file(origin) or auth.default(scopes=[_SCOPE], request=_request_class()())[0]
        except (auth.exceptions.GoogleAuthError, OSError, ValueError, AttributeError) as exc:
            # Its words may hold a piece of the file.
            where = origin or "this machine"
            raise refused(
                f"{self._provider.name}: {where} has no usable Google credentials ({type(exc).__name__}): run "
                "`gcloud auth application-default login`, or set $GOOGLE_APPLICATION_CREDENTIALS to the file of a "
                f"service account, or name it by providers.{self._provider.name}.api_key: file:/path"
            ) from None

    def _refresh(self, credentials: Any) -> None:
        auth = self._library()
        try:
            credentials.refresh(_request_class()())
        except auth.exceptions.GoogleAuthError as exc:
            raise refused(
                f"{self._provider.name}: Google gave no token ({type(exc).__name__}): the credentials may have ended; "
                "run `gcloud auth application-default login`, or look whether the service account's key is still valid"
            ) from None

    def _library(self) -> Any:
        try:
            import google.auth
            import google.auth.exceptions
        except ImportError:
            raise refused(
                f"{self._provider.name} needs the package google-auth for Google's credentials: "
                "pip install 'diptych[google]'"
            ) from None
        return google.auth


def _of_file(file: str) -> Any:
    """The credentials in a file of the two kinds that hold them; None for the kinds that say where to get some, which
    google-auth finds by itself.
    """
    if not file:
        return None
    from google.oauth2 import credentials, service_account

    kind = json.loads(Path(file).read_text(encoding="utf-8")).get("type")
    if kind == "service_account":
        return service_account.Credentials.from_service_account_file(  # type: ignore[no-untyped-call]
            file, scopes=[_SCOPE]
        )
    if kind == "authorized_user":
        return credentials.Credentials.from_authorized_user_file(  # type: ignore[no-untyped-call]
            file, scopes=[_SCOPE]
        )
    return None


def _request_class() -> Any:
    """google-auth brings no HTTP client of its own that we have."""
    import google.auth.transport

    class Answer(google.auth.transport.Response):
        def __init__(self, response: httpx2.Response) -> None:
            self._response = response

        @property
        def status(self) -> int:
            return self._response.status_code

        @property
        def headers(self) -> Mapping[str, str]:
            return self._response.headers

        @property
        def data(self) -> bytes:
            return self._response.content

    class Request(google.auth.transport.Request):
        def __call__(
            self,
            url: str,
            method: str = "GET",
            body: Any = None,
            headers: Any = None,
            timeout: Any = None,
            **options: Any,
        ) -> Answer:
            from google.auth.exceptions import TransportError

            try:
                with httpx2.Client(timeout=min(timeout or _TIMEOUT_S, _TIMEOUT_S), follow_redirects=False) as client:
                    return Answer(client.request(method, url, content=body, headers=headers))
            except httpx2.HTTPError as exc:
                raise TransportError(type(exc).__name__) from exc  # type: ignore[no-untyped-call]

    return Request
