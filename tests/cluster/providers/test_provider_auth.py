"""Google's tokens and Amazon's signatures: right by a second reading of their rules, told plainly where they lack."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import provider_wire as w
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from diptych.cluster.providers.auth import Sending, auth_for
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.failures import FailureKind, ProviderFailure

SENDING = Sending(
    "https://bedrock-runtime.eu-west-1.amazonaws.com/model/amazon.nova-lite-v1%3A0/converse",
    {"host": "bedrock-runtime.eu-west-1.amazonaws.com", "content-type": "application/json", "x-other": "1"},
    b'{"messages":[]}',
)


def service_account(folder: Path, token_uri: str) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    file = folder / "account.json"
    told = {
        "type": "service_account",
        "client_email": "a@b.iam.gserviceaccount.com",
        "private_key": pem,
        "private_key_id": "1",
        "token_uri": token_uri,
        "project_id": "proj",
    }
    file.write_text(json.dumps(told))
    return file


async def test_many_requests_to_vertex_ask_for_one_token(tmp_path: Path) -> None:
    async with w.wire(w.answers({"access_token": "ya29.secret-token", "expires_in": 3600})) as told:
        file = service_account(tmp_path, f"http://127.0.0.1:{told.port}/token")
        registry = Registry.load(
            {"vertex": ProviderSettings(account="proj")}, {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
        )
        auth = auth_for(registry.provider("vertex"), registry.keys)
        shown = await asyncio.gather(*(auth.show(SENDING) for _ in range(5)))
        assert {told.headers["authorization"] for told in shown} == {"Bearer ya29.secret-token"}
        assert len(told.seen) == 1
        assert "ya29" not in repr(shown)
        assert auth.key_id()


async def test_google_that_gives_no_token_is_a_failure_without_the_credentials(tmp_path: Path) -> None:
    async with w.wire(w.answers({"error": "invalid_grant"}, "400 Bad Request")) as told:
        file = service_account(tmp_path, f"http://127.0.0.1:{told.port}/token")
        given = ProviderSettings(account="proj", api_key=f"file:{file}")
        registry = Registry.load({"vertex": given}, {})
        with pytest.raises(ProviderFailure) as caught:
            await auth_for(registry.provider("vertex"), registry.keys).show(SENDING)
        assert caught.value.failure.kind is FailureKind.AUTH
        assert "gcloud auth application-default login" in str(caught.value)
        file.write_text('{"private_key": "very secret"')
        with pytest.raises(ProviderFailure) as caught:
            await auth_for(registry.provider("vertex"), registry.keys).show(SENDING)
        assert str(file) in str(caught.value)
        assert "very" not in str(caught.value)


def expected(secret: str, amz_date: str, signed: str, headers: dict[str, str]) -> str:
    """The signature by the published steps."""
    parts = urlsplit(SENDING.url)
    lines = [f"{name}:{headers[name]}" for name in signed.split(";")]
    payload = hashlib.sha256(SENDING.body).hexdigest()
    canonical = "\n".join(["POST", quote(parts.path, safe="/-_.~"), "", *lines, "", signed, payload])
    scope = f"{amz_date[:8]}/eu-west-1/bedrock/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", amz_date, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret}".encode()
    for piece in scope.split("/"):
        key = hmac.new(key, piece.encode(), hashlib.sha256).digest()
    return hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return monkeypatch


async def test_a_signature_is_the_one_of_the_published_steps(no_aws: pytest.MonkeyPatch) -> None:
    """A path whose colon is written as %3A is written once more in what is signed."""
    no_aws.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    no_aws.setenv("AWS_SECRET_ACCESS_KEY", "secretexample")
    registry = Registry.load({}, {"AWS_REGION": "eu-west-1"})
    shown = await auth_for(registry.provider("bedrock"), registry.keys).show(SENDING)
    authorization = shown.headers["authorization"]
    signed = authorization.partition("SignedHeaders=")[2].partition(",")[0]
    headers = {**SENDING.headers, **shown.headers}
    assert {"host", "content-type", "x-amz-date"} <= set(signed.split(";"))
    assert authorization.endswith(
        "Signature=" + expected("secretexample", shown.headers["x-amz-date"], signed, headers)
    )
    assert "secretexample" not in repr(shown) + authorization


async def test_a_bedrock_key_needs_no_signature() -> None:
    registry = Registry.load({}, {"AWS_REGION": "eu-west-1", "AWS_BEARER_TOKEN_BEDROCK": "bedrock-key-1"})
    auth = auth_for(registry.provider("bedrock"), registry.keys)
    assert (await auth.show(SENDING)).headers == {"authorization": "Bearer bedrock-key-1"}


async def test_no_credentials_and_no_package_are_told_apart(no_aws: pytest.MonkeyPatch) -> None:
    registry = Registry.load({}, {"AWS_REGION": "eu-west-1", "GOOGLE_CLOUD_PROJECT": "p"})
    with pytest.raises(ProviderFailure, match="AWS_BEARER_TOKEN_BEDROCK to a Bedrock API key; without any key"):
        await auth_for(registry.provider("bedrock"), registry.keys).show(SENDING)
    no_aws.setitem(sys.modules, "botocore", None)  # type: ignore[arg-type]
    no_aws.setitem(sys.modules, "botocore.exceptions", None)  # type: ignore[arg-type]
    with pytest.raises(ProviderFailure, match=r"pip install 'diptych\[aws\]'"):
        await auth_for(registry.provider("bedrock"), registry.keys).show(SENDING)
    no_aws.setitem(sys.modules, "google.auth", None)  # type: ignore[arg-type]
    with pytest.raises(ProviderFailure, match=r"pip install 'diptych\[google\]'"):
        await auth_for(registry.provider("vertex"), registry.keys).show(SENDING)
