"""What stands under `security:` is checked before anything starts, and each refusal names the file and the remedy."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from diptych.cluster import doctor_cluster
from diptych.cluster.config import DiptychConfig, EngineSettings, SecuritySettings, TlsSettings, load_config
from diptych.cluster.control.keyring import deposit, fetch, withdraw
from diptych.cluster.control.plan import PLAINTEXT
from diptych.cluster.doctor_machine import State
from diptych.cluster.security import check_security, engine_name, names_of, read_secret, trust_of, why_exposed
from diptych.protos.errors import StartupError
from diptych.protos.trust import secret_id
from diptych.protos.types import Role

NAMES = ("router", "prefill", "decode")


def settings(folder: Path, cert: str = "{role}.crt", key: str = "{role}.key", ca: str = "ca.crt") -> SecuritySettings:
    return SecuritySettings(tls=TlsSettings(ca=folder / ca, cert=folder / cert, key=folder / key))


@pytest.fixture
def copy(authority: Path, tmp_path: Path) -> Path:
    """The certificates, to be spoilt."""
    return Path(shutil.copytree(authority, tmp_path / "tls"))


def secret_file(folder: Path, text: str = "ab" * 32, mode: int = 0o600) -> Path:
    file = folder / "secret"
    file.write_text(text)
    file.chmod(mode)
    return file


# ---- channels that leave the machine ----


def test_engines_off_loopback_need_tls_or_a_setting_that_says_so() -> None:
    with pytest.raises(StartupError, match=r"security: engines\.host 10\.0\.0\.1 .* security\.tls, or security\.allow"):
        load_config(overrides=["engines.host=10.0.0.1"])
    with pytest.raises(StartupError, match=r"engines\.host fe80::1"):
        load_config(overrides=["engines.host='fe80::1'", "security.secret_file=/s"])
    load_config(overrides=["engines.host=10.0.0.1", "security.allow_plaintext=true"])
    load_config(overrides=["engines.host=10.0.0.1", "security.tls={ca: a, cert: b, key: c}"])
    for host in ("127.0.0.1", "'::1'", "null"):
        load_config(overrides=[f"engines.host={host}"])


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "localhost", "example.org"])
def test_engines_listen_on_an_address_that_peers_can_dial(host: str) -> None:
    with pytest.raises(StartupError, match=r"engines\.host: "):
        load_config(overrides=[f"engines.host={host}", "security.allow_plaintext=true"])


def test_plaintext_outside_is_a_degraded_choice_that_is_told() -> None:
    assert "allow_plaintext" in PLAINTEXT


# ---- the secret ----


def test_a_secret_file_holds_64_hexadecimal_digits(tmp_path: Path) -> None:
    assert read_secret(secret_file(tmp_path)) == bytes.fromhex("ab" * 32)
    assert read_secret(secret_file(tmp_path, "AB" * 32 + "\n")) == bytes.fromhex("ab" * 32)
    for text in ("", "password", "ab" * 31, "ab" * 33, "zz" * 32, "\n" + "ab" * 32):
        with pytest.raises(StartupError, match="openssl rand -hex 32"):
            read_secret(secret_file(tmp_path, text))
    with pytest.raises(StartupError, match="cannot read"):
        read_secret(tmp_path / "none")
    with pytest.raises(StartupError, match="cannot read"):
        read_secret(tmp_path)
    with pytest.raises(StartupError, match="larger"):
        read_secret(secret_file(tmp_path, "a" * ((1 << 20) + 1)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_secret_that_others_can_read_is_none(tmp_path: Path, mode: int) -> None:
    with pytest.raises(StartupError, match=r"security\.secret_file: .* can be read by other users .*chmod 600"):
        read_secret(secret_file(tmp_path, mode=mode))


def test_whose_file_and_which_bits_make_a_secret() -> None:
    regular, me, root, other = stat.S_IFREG, 1000, 0, 1001
    for mode, owner, is_fine in (
        (0o600, me, True),
        (0o400, me, True),
        (0o440, me, False),
        (0o440, root, True),  # as Kubernetes mounts it for a process of a group
        (0o460, root, False),
        (0o444, root, False),
        (0o600, other, False),
    ):
        assert (why_exposed(regular | mode, owner, me) is None) is is_fine, (oct(mode), owner)


class Store(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value

    def put_new(self, key: str, value: bytes) -> None:
        self.setdefault(key, value)

    def delete(self, key: str) -> None:
        self.pop(key, None)


def test_a_cluster_keeps_its_secret_until_a_file_says_otherwise_or_it_ends(tmp_path: Path) -> None:
    store, plain = Store(), SecuritySettings()
    with pytest.raises(StartupError, match="start that first"):
        fetch(store)
    first = deposit(store, plain)
    secret = fetch(store)
    assert (len(secret), first) == (32, secret_id(secret))
    assert deposit(store, plain) == first  # engines that live go on
    other = deposit(store, SecuritySettings(secret_file=secret_file(tmp_path)))
    assert other != first
    assert fetch(store) == bytes.fromhex("ab" * 32)
    withdraw(store)
    assert deposit(store, plain) not in (first, other)


def test_the_configuration_carries_the_place_of_the_secret_and_not_the_secret(tmp_path: Path) -> None:
    config = DiptychConfig(security=SecuritySettings(secret_file=secret_file(tmp_path)))
    assert "ab" * 32 not in f"{config!r} {config.model_dump_json()}"


# ---- certificates ----


def test_the_recipe_on_the_page_makes_certificates_that_pass(authority: Path) -> None:
    check_security(settings(authority), NAMES)
    trust = trust_of(settings(authority), bytes(32), "decode")
    assert trust.tls is not None
    assert trust.tls.cert == (authority / "decode.crt").read_bytes()
    assert trust.tls.key.decode() not in repr(trust.tls)


def test_every_process_of_the_layout_is_checked() -> None:
    assert names_of(DiptychConfig()) == ["router", "decode", "prefill"]
    colocated = load_config(overrides=["models.smollm2-135m-instruct.layout=colocated"])
    assert names_of(colocated) == ["router", "decode"]
    assert engine_name({Role.PREFILL, Role.DECODE}) == "decode-prefill"


def test_a_certificate_is_for_its_role(copy: Path) -> None:
    shutil.copy(copy / "decode.crt", copy / "router.crt")
    shutil.copy(copy / "decode.key", copy / "router.key")
    with pytest.raises(
        StartupError, match=r"router\.crt is not a certificate for router\.diptych\.internal.*has decode"
    ):
        check_security(settings(copy), NAMES)
    with pytest.raises(StartupError, match=r"decode\.crt is not a certificate for (prefill|router)"):
        check_security(settings(copy, cert="decode.crt", key="decode.key"), NAMES)


def test_a_stranger_s_or_an_expired_certificate_is_refused_in_words(
    authority: Path, stranger: Path, expired: Path, copy: Path
) -> None:
    shutil.copy(stranger / "ca.crt", copy / "ca.crt")
    with pytest.raises(StartupError, match=r"security\.tls\.cert: .*router\.crt is not vouched for by .*ca\.crt"):
        check_security(settings(copy), NAMES)
    with pytest.raises(StartupError, match="expired"):
        check_security(settings(expired), NAMES)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ca.crt", "nothing", r"security\.tls\.ca: .*ca\.crt holds no certificates"),
        ("prefill.crt", "nothing", r"security\.tls\.key: .*prefill\.key is not the private key of .*prefill\.crt"),
        ("prefill.key", "nothing", r"security\.tls\.key: .*prefill\.key is not the private key of .*prefill\.crt"),
        ("prefill.key", None, r"security\.tls\.key: cannot read .*prefill\.key"),
    ],
)
def test_a_spoilt_file_is_named(copy: Path, name: str, text: str | None, words: str) -> None:
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(StartupError, match=words):
        check_security(settings(copy), NAMES)


def test_another_s_key_and_one_that_others_can_read_are_refused(copy: Path) -> None:
    os.chmod(copy / "router.key", 0o644)
    with pytest.raises(StartupError, match=r"security\.tls\.key: .*router\.key can be read by other users"):
        check_security(settings(copy), NAMES)
    shutil.copy(copy / "decode.key", copy / "router.key")
    os.chmod(copy / "router.key", 0o600)
    with pytest.raises(StartupError, match=r"router\.key is not the private key of"):
        check_security(settings(copy), NAMES)


# ---- what the doctor says ----


def test_the_doctor_tells_of_files_that_would_stop_a_start_and_of_plaintext(authority: Path, tmp_path: Path) -> None:
    def finding(security: SecuritySettings, host: str | None = None) -> tuple[State, str]:
        told = doctor_cluster.security(DiptychConfig(engines=EngineSettings(host=host), security=security))
        assert told.remedy or told.state is State.OK
        return told.state, told.told

    assert finding(SecuritySettings()) == (State.OK, "engines and routers talk on this machine only")
    assert finding(settings(authority), "10.0.0.1") == (State.OK, "mutual TLS between engines and routers")
    state, words = finding(SecuritySettings(secret_file=secret_file(tmp_path, mode=0o644)))
    assert (state, "chmod 600" in words) == (State.STOP, True)
    state, words = finding(SecuritySettings(allow_plaintext=True), "10.0.0.1")
    assert (state, "10.0.0.1" in words) == (State.SLOW, True)
