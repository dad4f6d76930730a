"""The cluster key: 32 secret bytes that every process of a cluster holds. Where it is found, made, and how it is written.

A key is looked up, in this order: what `--key` said; `CAKE_CLUSTER_KEY` (the key itself); `CAKE_CLUSTER_KEY_FILE`; the
file `cluster.key` in `CAKE_CONFIG_DIR`, else in `/data/.cake` if `/data` is a mount (containers that share one volume
share one key), else in the user's configuration folder. 64 hex digits are a key, any other text is a passphrase.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cake_core.errors import ConfigError

log = logging.getLogger(__name__)

FILE = "cluster.key"
VARIABLE = "CAKE_CLUSTER_KEY"
FILE_VARIABLE = "CAKE_CLUSTER_KEY_FILE"
_VOLUME = Path("/data")
_SETTLE = 2.0  # seconds to wait for another process that is just writing the file
_SHORT = 16  # a passphrase with fewer characters can be guessed


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """`secret` never appears in a message or a repr; `source` says where the key was found, `made` that it is new."""

    secret: bytes = field(repr=False)
    source: str = "given"
    made: bool = False

    def __post_init__(self) -> None:
        if len(self.secret) != 32:
            raise ConfigError(f"a cluster key has 32 bytes, not {len(self.secret)}; `cake key new` makes one")

    @property
    def text(self) -> str:
        """The form to paste into `cake key join`."""
        return self.secret.hex()

    def derive(self, purpose: bytes) -> bytes:
        """A key of its own for one purpose, so that what is shown for one proves nothing for another."""
        return hmac.digest(self.secret, b"cake cluster key: " + purpose, "sha256")


def parse_key(text: str, source: str = "given") -> ClusterKey:
    """Raises ConfigError for text that can be neither a key nor a passphrase."""
    text = text.strip()
    if not text:
        raise ConfigError(f"the cluster key ({source}) is empty; `cake key new` makes one")
    with contextlib.suppress(ValueError):
        if len(text) == 64 and text.isascii():
            return ClusterKey(bytes.fromhex(text), source)
    if len(text) < _SHORT:
        log.warning("the cluster key (%s) is a passphrase of only %d characters; `cake key new` makes a key", source, len(text))
    return ClusterKey(_stretch(text), source)


@functools.lru_cache(maxsize=4)
def _stretch(passphrase: str) -> bytes:
    """About half a second and 128 MiB for each guess. The salt is fixed because every node must come to the same key."""
    return hashlib.scrypt(passphrase.encode(), salt=b"cake cluster key 1", n=2**17, r=8, p=1, maxmem=2**28, dklen=32)


def key_folder(config_dir: Path, env: Mapping[str, str] = os.environ, volume: Path = _VOLUME) -> Path:
    """The folder of the key file; `config_dir` is `Options.config_dir`."""
    if not env.get("CAKE_CONFIG_DIR") and os.path.ismount(volume):
        return volume / ".cake"
    return config_dir


def find_key(flag: str | None, config_dir: Path, env: Mapping[str, str] = os.environ) -> ClusterKey | None:
    """The key there is, or None. `flag` is the text given to `--key`. Raises ConfigError for one that cannot be read."""
    if flag is not None:
        return parse_key(flag, "--key")
    if text := env.get(VARIABLE):
        return parse_key(text, VARIABLE)
    if name := env.get(FILE_VARIABLE):
        found = read_key(Path(name))
        if found is None:
            raise ConfigError(f"{FILE_VARIABLE} names {name}, which does not exist; write the key there or unset it")
        return found
    return read_key(key_folder(config_dir, env) / FILE)


def obtain_key(flag: str | None, config_dir: Path, env: Mapping[str, str] = os.environ) -> ClusterKey:
    """The key there is, or a new one (`made`), kept in the key folder. To be called when a connection first needs it."""
    found = find_key(flag, config_dir, env)
    if found is not None:
        return found
    path = key_folder(config_dir, env) / FILE
    key = ClusterKey(secrets.token_bytes(32), str(path), made=True)
    if keep_key(key, path):
        return key
    # Another process was faster: its key is the cluster's.
    theirs = read_key(path)
    if theirs is None:
        raise ConfigError(f"the key file {path} was removed while it was read; start again")
    return theirs


def read_key(path: Path) -> ClusterKey | None:
    """The key in a file, None if there is no such file. Waits briefly for a process that is just writing it."""
    give_up = time.monotonic() + _SETTLE
    try:
        while not (text := path.read_text("utf-8")).strip() and time.monotonic() < give_up:
            time.sleep(0.02)
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the cluster key {path}: {error}; mend it, or set {VARIABLE}") from error
    if sys.platform != "win32" and mode & 0o077:
        log.warning("other users of this machine may read the cluster key: run `chmod 600 %s`", path)
    return parse_key(text, str(path))


def keep_key(key: ClusterKey, path: Path, replace: bool = False) -> bool:
    """Writes a key file that only its owner may read. False if there is one already and `replace` is not set.

    The file appears with its content, all at once; of several processes that write at the same time exactly one succeeds.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(draft, key.text)
        try:
            if replace:
                draft.replace(path)
                return True
            return _publish(draft, path, key.text)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the cluster key in {path}: {error.strerror or error}; set {VARIABLE} or CAKE_CONFIG_DIR"
        ) from error


def _publish(draft: Path, path: Path, text: str) -> bool:
    try:
        if sys.platform == "win32":
            draft.rename(path)  # which fails there if the file exists
        else:
            os.link(draft, path)  # rename would replace a key that another process has made and uses
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: exclusive creation is as safe, only that the content comes a moment later.
        try:
            _write(path, text)
        except FileExistsError:
            return False
    return True


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
