"""The file of API keys: who may write it, what it holds, and that a change of it counts at once or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from diptych.cluster.config import SecuritySettings
from diptych.cluster.keygen import run_keygen
from diptych.cluster.keys import MAX_KEY_BYTES, ApiKeys, Caller, add_key, key_line, make_key, read_keys
from diptych.cluster.security import check_security
from diptych.protos.errors import StartupError


def write(file: Path, *lines: str, mode: int = 0o600) -> Path:
    """As a careful operator does: whole or not at all."""
    partial = file.with_suffix(".new")
    partial.write_text("".join(f"{line}\n" for line in lines))
    partial.chmod(mode)
    partial.replace(file)
    return file


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_belongs_to_the_tenant_of_its_line(tmp_path: Path) -> None:
    first, second, admin, other = (make_key() for _ in range(4))
    a, b = Caller("a"), Caller("ops", is_admin=True)
    file = write(tmp_path / "k", "# two of one tenant", key_line(first, a), "", key_line(second, a), key_line(admin, b))
    keys = ApiKeys(file)
    assert [keys.caller(key.encode()) for key in (first, second, admin, other)] == [a, a, b, None]
    for wrong in (b"", b"x", first[:-1].encode(), first.encode() + b" ", first.upper().encode(), b"\xff\0" * 9):
        assert keys.caller(wrong) is None


def test_what_the_file_holds_is_no_key(tmp_path: Path) -> None:
    """Who reads the file cannot call the API."""
    key = make_key()
    file = write(tmp_path / "k", key_line(key, Caller("a")))
    assert key not in file.read_text()
    digest = json.loads(file.read_text())["sha256"]
    assert ApiKeys(file).caller(digest.encode()) is None
    assert ApiKeys(file).caller(bytes.fromhex(digest)) is None
    long = "k" * (MAX_KEY_BYTES + 1)
    assert ApiKeys(write(file, key_line(long, Caller("a")))).caller(long.encode()) is None


def test_keys_differ_and_are_long() -> None:
    made = {make_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("dk_") and len(key) == 46 for key in made)


def test_a_changed_file_counts_a_quarter_of_a_second_later(tmp_path: Path) -> None:
    """A key is revoked without a restart."""
    clock, old, new = Clock(), make_key(), make_key()
    file = write(tmp_path / "k", key_line(old, Caller("a")))
    keys = ApiKeys(file, clock)
    write(file, key_line(new, Caller("a")))
    assert keys.caller(old.encode()) is not None
    clock.now += 0.25
    assert keys.caller(old.encode()) is None
    assert keys.caller(new.encode()) == Caller("a")
    assert keys.fault == ""


@pytest.mark.parametrize("change", ["gone", "open", "torn", "empty"])
def test_a_file_that_was_spoilt_lets_nobody_in_and_is_told(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, old, new = Clock(), make_key(), make_key()
    file = write(tmp_path / "k", key_line(old, Caller("a")))
    keys = ApiKeys(file, clock)
    line = key_line(new, Caller("b", is_admin=True))
    match change:
        case "gone":
            file.unlink()
        case "open":
            write(file, line, mode=0o622)
        case "torn":
            write(file, line, line[:40])
        case "empty":
            write(file)
    for _ in range(3):
        clock.now += 1
        assert keys.caller(new.encode()) is None
        assert keys.caller(old.encode()) == Caller("a")
    assert "the keys from before still hold" in keys.fault
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    write(file, key_line(new, Caller("b")))
    clock.now += 1
    assert keys.caller(old.encode()) is None
    assert (keys.caller(new.encode()), keys.fault) == (Caller("b"), "")
    assert new not in caplog.text
    assert hashlib.sha256(new.encode()).hexdigest() not in caplog.text


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x", "line 2 of .*: not JSON"),
        ("[" * 100_000, "line 2 of .*: not JSON"),
        ("[]", "there are the fields admin, sha256, tenant"),
        (json.dumps({"sha256": DIGEST, "tenant": "a", "scope": 1}), "there are the fields"),
        (json.dumps({"tenant": "a"}), "64 lower-case hexadecimal digits"),
        (json.dumps({"sha256": "A" * 64, "tenant": "a"}), "64 lower-case hexadecimal digits"),
        (json.dumps({"sha256": DIGEST}), "tenant must have"),
        (json.dumps({"sha256": DIGEST, "tenant": "a\nb"}), "tenant must have"),
        (json.dumps({"sha256": DIGEST, "tenant": "a", "admin": "no"}), "admin must be true or false"),
        (json.dumps({"sha256": DIGEST, "tenant": "a", "admin": 1}), "admin must be true or false"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: str, words: str) -> None:
    file = write(tmp_path / "k", key_line(make_key(), Caller("a")), line)
    with pytest.raises(StartupError, match=words) as told:
        read_keys(file)
    assert DIGEST not in str(told.value)


def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    line = key_line(make_key(), Caller("a"))
    for file, words in (
        (tmp_path / "none", "cannot read"),
        (write(tmp_path / "empty", "# none yet"), "holds no key"),
        (write(tmp_path / "twice", line, line), "the same key"),
        (write(tmp_path / "open", line, mode=0o644), "can be read by other users"),
    ):
        with pytest.raises(StartupError, match=f"security.api_keys: .*{words}"):
            check_security(SecuritySettings(api_keys=file), [])
    check_security(SecuritySettings(api_keys=write(tmp_path / "good", line)), [])


def test_keygen_shows_the_key_once_and_keeps_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_keygen("a", is_admin=False, file=None) == 0
    key, line = capsys.readouterr().out.splitlines()
    assert key_line(key, Caller("a")) == line
    file = tmp_path / "keys.jsonl"
    assert run_keygen("a", is_admin=False, file=file) == 0
    file.write_text(file.read_text().rstrip("\n"))  # an editor that leaves the last line open
    assert run_keygen("ops", is_admin=True, file=file) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = ApiKeys(file)
    assert keys.caller(first.encode()) == Caller("a")
    assert keys.caller(second.encode()) == Caller("ops", is_admin=True)


def test_keygen_refuses_what_no_header_can_name_and_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tenant in ("", " a", "a\n", "\u00e4", "x" * 129):
        assert run_keygen(tenant, is_admin=False, file=tmp_path / "k") == 1
    assert run_keygen("a", is_admin=False, file=tmp_path / "none" / "k") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "cannot write" in told.err
    assert not (tmp_path / "k").exists()


def test_a_new_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        add_key(tmp_path / "k", key_line(make_key(), Caller("a")))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
