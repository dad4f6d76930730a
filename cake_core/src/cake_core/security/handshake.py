"""Two processes prove to each other that they hold the cluster key, over any channel, before anything else is said.

Four messages, each the header of an empty message of the channel::

    "CAKE" format kind payload
        1  dialler  -> listener   mode, nonce, hello
        2  listener -> dialler    mode, nonce, hello
        3  dialler  -> listener   proof
        4  listener -> dialler    proof

A proof is an HMAC over a label, the prover's role, the mode, both nonces, the channel's binding and both hellos, under a
key derived from the cluster key. The dialler proves first, so a scanner gets no proof to guess at; the roles stop
reflection, the nonces replay, the binding a relay, the hellos a downgrade. Whatever is wrong, the wire only shows a closed
connection; the reason stays with the end that found it. The format byte and this framing never change: what does change
is told in the hellos, and compared only after the proofs.

`Handshake` does no input or output. `authenticate_dialler` and `authenticate_listener` run it over a blocking channel.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Literal, NoReturn

from cake_core.errors import AuthenticationError, ChannelClosed, DeadlineExceeded, ProtocolError, TransportError
from cake_core.security.keys import ClusterKey
from cake_core.transport import Channel

MAGIC = b"CAKE\x01"
MAX_HELLO = 4096
"""Largest hello in bytes: what a stranger may make us keep."""
NONCE = 32
_PROOF = 32
_LABEL = b"cake handshake 1"
_INSECURE = b"no key: this only compares what was said"
_MODES = {False: b"\x00", True: b"\x01"}

Role = Literal["dialler", "listener"]


class Handshake:
    """One end. Send what `open` returns, feed each frame to `receive` and send what that returns, until `done`.

    `key` None is insecure mode, which both ends must have chosen. After `done`, `peer_hello` is what the other end said,
    proven to come from a holder of the key over this very connection.
    """

    def __init__(self, role: Role, key: ClusterKey | None, hello: bytes, binding: bytes, nonce: bytes) -> None:
        if len(hello) > MAX_HELLO:
            raise ProtocolError(f"a hello has at most {MAX_HELLO} bytes, not {len(hello)}")
        if len(nonce) != NONCE:
            raise ProtocolError(f"a nonce has {NONCE} bytes, not {len(nonce)}")
        self._dials = role == "dialler"
        self._mode = _MODES[key is not None]
        self._secret = _INSECURE if key is None else key.derive(b"handshake")
        self._hello = hello
        self._binding = binding
        self._nonce = nonce
        self._expected = 2 if self._dials else 1
        self._proofs: dict[bool, bytes] = {}
        self.peer_hello = b""
        self.proved = False
        """Whether this end has shown its proof."""
        self.done = False

    def open(self) -> list[bytes]:
        return [self._introduction(1)] if self._dials else []

    def receive(self, frame: bytes) -> list[bytes]:
        """Raises ProtocolError for bytes that are no handshake, AuthenticationError for one that proves nothing."""
        if self.done or len(frame) <= len(MAGIC) or not frame.startswith(MAGIC) or frame[len(MAGIC)] != self._expected:
            raise ProtocolError("it does not follow Cake's handshake; is it another program, or another release of Cake?")
        payload = frame[len(MAGIC) + 1 :]
        self._expected += 2
        return self._meet(payload) if self._expected in (3, 4) else self._verify(payload)

    def _introduction(self, kind: int) -> bytes:
        return MAGIC + bytes([kind]) + self._mode + self._nonce + self._hello

    def _meet(self, payload: bytes) -> list[bytes]:
        mode, nonce, hello = payload[:1], payload[1 : 1 + NONCE], payload[1 + NONCE :]
        if len(nonce) != NONCE or len(hello) > MAX_HELLO:
            raise ProtocolError("its introduction has the wrong size")
        if mode != self._mode:
            raise AuthenticationError(_mode_differs(self._mode == _MODES[True]))
        self.peer_hello = hello
        nonces = (self._nonce, nonce) if self._dials else (nonce, self._nonce)
        hellos = (self._hello, hello) if self._dials else (hello, self._hello)
        for dials in (True, False):
            self._proofs[dials] = self._proof(b"dialler" if dials else b"listener", nonces, hellos)
        if not self._dials:
            return [self._introduction(2)]
        self.proved = True
        return [MAGIC + b"\x03" + self._proofs[True]]

    def _proof(self, role: bytes, nonces: tuple[bytes, bytes], hellos: tuple[bytes, bytes]) -> bytes:
        digests = (hashlib.sha256(hello).digest() for hello in hellos)
        fields = (_LABEL, role, self._mode, *nonces, self._binding, *digests)
        # Each field with its length, so that no two different lists of fields are the same bytes.
        text = b"".join(len(item).to_bytes(4, "big") + item for item in fields)
        return hmac.digest(self._secret, text, "sha256")

    def _verify(self, proof: bytes) -> list[bytes]:
        if len(proof) != _PROOF:
            raise ProtocolError("its proof has the wrong size")
        if not hmac.compare_digest(proof, self._proofs[not self._dials]):
            raise AuthenticationError(
                "it does not hold this cluster's key, or somebody stands between; compare `cake key show` on both machines"
            )
        self.done = True
        if self._dials:
            return []
        self.proved = True
        return [MAGIC + b"\x04" + self._proofs[False]]


def authenticate_dialler(channel: Channel, key: ClusterKey | None, hello: bytes, timeout: float) -> bytes:
    """Proves ourselves, then checks the listener; its hello. The channel is aborted on any error.

    Raises:
        AuthenticationError: the other end does not hold the key, or will not take ours; to try again is of no use.
        ChannelClosed, DeadlineExceeded: it went away or was silent; it may be there later.
        ProtocolError: it speaks something else.
    """
    return run(channel, Handshake("dialler", key, hello, channel.binding, secrets.token_bytes(NONCE)), key, timeout)


def authenticate_listener(channel: Channel, key: ClusterKey | None, hello: bytes, timeout: float) -> bytes:
    """The other half of `authenticate_dialler`, with the same errors."""
    return run(channel, Handshake("listener", key, hello, channel.binding, secrets.token_bytes(NONCE)), key, timeout)


def run(channel: Channel, handshake: Handshake, key: ClusterKey | None, timeout: float) -> bytes:
    """Runs one end over a blocking channel; the peer's hello."""
    deadline = time.monotonic() + timeout
    try:
        check_encryption(channel, key)
        for frame in handshake.open():
            channel.send(frame, (), timeout)
        while not handshake.done:
            received, _ = channel.receive(refuse_body, max(0.0, deadline - time.monotonic()))
            for frame in handshake.receive(received):
                channel.send(frame, (), max(0.0, deadline - time.monotonic()))
    except TransportError as error:
        channel.abort()
        raise explain(error, channel, handshake, timeout) from error
    except BaseException:
        channel.abort()
        raise
    return handshake.peer_hello


def check_encryption(channel: Channel, key: ClusterKey | None) -> None:
    """A proof over a channel that anybody can write into proves nothing about what follows."""
    if key is not None and not channel.encrypted:
        raise AuthenticationError("its transport does not encrypt, so the cluster key cannot protect it; use tcp:// or quic://")


def refuse_body(header: bytes, length: int) -> NoReturn:  # noqa: ARG001 - the signature of Allocate
    """The `allocate` of a channel whose peer has not proved itself: not one byte."""
    raise ProtocolError("it sent data before it proved that it holds the cluster key")


def explain(error: TransportError, channel: Channel, handshake: Handshake, timeout: float) -> TransportError:
    """An error met while a handshake ran, naming the peer and what to do."""
    if isinstance(error, ChannelClosed):
        if handshake.proved and not handshake.done:
            return AuthenticationError(
                f"{channel.peer} did not accept our cluster key: it holds another one; "
                "run `cake key show` here and `cake key join` there"
            )
        return ChannelClosed(
            f"{channel.peer} closed the connection during the handshake; its log says why (if only one of the two "
            "was started with --insecure, start both alike)"
        )
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"{channel.peer} did not finish the handshake in {timeout:g} s")
    text = str(error)
    return type(error)(text if channel.peer in text else f"{channel.peer}: {text}")


def _mode_differs(secure: bool) -> str:
    if secure:
        return "it runs with --insecure and this end does not; start it without, with this cluster's key (`cake key show`)"
    return "it wants a cluster key and this end runs with --insecure; start this end without --insecure"
