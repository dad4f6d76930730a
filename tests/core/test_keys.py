"""The cluster key: where it is found, that it is made once, and who may read it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cake_core.errors import ConfigError
from cake_core.security import keys
from cake_core.security.keys import ClusterKey, find_key, keep_key, key_folder, obtain_key, parse_key, read_key

HEX = "0123456789abcdef" * 4
FAST = {"n": 2, "r": 1, "p": 1}
posix = pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")


@pytest.fixture
def quick_scrypt(monkeypatch):
    real = keys.hashlib.scrypt
    monkeypatch.setattr(keys.hashlib, "scrypt", lambda *a, **k: real(*a, **{**k, **FAST}))
    keys._stretch.cache_clear()
    yield
    keys._stretch.cache_clear()


def test_sixty_four_hex_digits_are_a_key():
    assert parse_key(f"  {HEX}\n").secret == bytes.fromhex(HEX)
    assert parse_key(HEX.upper()).text == HEX


@pytest.mark.parametrize("text", [HEX[:-1], HEX + "0", "g" * 64, "correct horse battery staple", "密码" * 32])
@pytest.mark.usefixtures("quick_scrypt")
def test_anything_else_is_a_passphrase(text):
    key = parse_key(text)
    assert len(key.secret) == 32
    assert key.secret == parse_key(text).secret != parse_key(text + "!").secret


def test_a_passphrase_costs_what_it_should(monkeypatch):
    asked = {}
    monkeypatch.setattr(keys.hashlib, "scrypt", lambda text, **given: asked.update(given) or bytes(32))
    keys._stretch.cache_clear()
    parse_key("a long enough passphrase")
    keys._stretch.cache_clear()
    assert asked["n"] * asked["r"] >= 2**20


@pytest.mark.usefixtures("quick_scrypt")
def test_a_short_passphrase_is_warned_about(caplog):
    parse_key("a passphrase of some length")
    assert not caplog.records
    parse_key("sesame")
    assert "only 6 characters" in caplog.text


def test_an_empty_key_is_no_key():
    with pytest.raises(ConfigError, match="cake key new"):
        parse_key("  \n")


def test_a_key_does_not_show_itself():
    assert HEX not in repr(parse_key(HEX))
    assert str(bytes.fromhex(HEX)) not in repr(parse_key(HEX))


def test_each_purpose_has_its_own_key():
    key = parse_key(HEX)
    assert len({key.derive(b"a"), key.derive(b"b"), key.secret}) == 3


def test_the_order_of_places(tmp_path, caplog):
    def text(n):
        return f"{n:064x}"

    named, folder = tmp_path / "elsewhere", tmp_path / "config"
    keep_key(parse_key(text(3)), named)
    keep_key(parse_key(text(4)), folder / keys.FILE)
    env = {"CAKE_CLUSTER_KEY": text(2), "CAKE_CLUSTER_KEY_FILE": str(named), "CAKE_CONFIG_DIR": str(folder)}
    found = [find_key(text(1), folder, env)]
    found.append(find_key(None, folder, env))
    del env["CAKE_CLUSTER_KEY"]
    found.append(find_key(None, folder, env))
    del env["CAKE_CLUSTER_KEY_FILE"]
    found.append(find_key(None, folder, env))
    assert [int(key.text, 16) for key in found] == [1, 2, 3, 4]
    assert [key.source for key in found] == ["--key", "CAKE_CLUSTER_KEY", str(named), str(folder / keys.FILE)]
    assert find_key(None, tmp_path / "empty", {"CAKE_CONFIG_DIR": "set"}) is None
    assert not caplog.records


def test_a_key_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="CAKE_CLUSTER_KEY_FILE names"):
        find_key(None, tmp_path, {"CAKE_CLUSTER_KEY_FILE": str(tmp_path / "none")})


def test_containers_share_the_key_of_their_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == Path("/data"))
    assert key_folder(tmp_path, {}) == Path("/data/.cake")
    assert key_folder(tmp_path, {"CAKE_CONFIG_DIR": str(tmp_path)}) == tmp_path
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    assert key_folder(tmp_path, {}) == tmp_path


def test_a_key_is_made_once(tmp_path):
    env = {"CAKE_CONFIG_DIR": str(tmp_path)}
    first, second = obtain_key(None, tmp_path / "new", env), obtain_key(None, tmp_path / "new", env)
    assert (first.made, second.made) == (True, False)
    assert first.text == second.text
    assert [path.name for path in (tmp_path / "new").iterdir()] == [keys.FILE]


def test_processes_that_start_together_get_one_key(tmp_path):
    code = (
        "import sys; from pathlib import Path; from cake_core.security.keys import obtain_key\n"
        "sys.stdin.readline(); key = obtain_key(None, Path(sys.argv[1]), {'CAKE_CONFIG_DIR': 'set'}); print(key.made, key.text)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    together = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    for process in together:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in together]
    assert len({text for _, text in said}) == 1
    assert sorted(made for made, _ in said) == ["False"] * 5 + ["True"]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / keys.FILE
    assert keep_key(parse_key(HEX), path)
    assert not keep_key(parse_key("f" * 64), path)
    assert read_key(path).text == HEX
    assert [found.name for found in tmp_path.iterdir()] == [keys.FILE]


def test_a_key_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / keys.FILE
    assert keep_key(parse_key(HEX), path)
    assert not keep_key(parse_key("f" * 64), path)
    assert keep_key(parse_key("f" * 64), path, replace=True)
    assert read_key(path).text == "f" * 64


@posix
def test_only_the_owner_may_read_it(tmp_path, caplog):
    path = tmp_path / "folder" / keys.FILE
    keep_key(parse_key(HEX), path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    read_key(path)
    assert not caplog.records
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_key(path)
    assert f"chmod 600 {path}" in caplog.text


def test_a_file_that_is_just_being_written_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / keys.FILE
    path.touch(mode=0o600)
    monkeypatch.setattr(keys.time, "sleep", lambda seconds: path.write_text(HEX))
    assert read_key(path).text == HEX


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="CAKE_CLUSTER_KEY"):
        obtain_key(None, tmp_path / "file", {"CAKE_CONFIG_DIR": "set"})


def test_a_key_has_thirty_two_bytes():
    with pytest.raises(ConfigError, match="32 bytes"):
        ClusterKey(b"short")
