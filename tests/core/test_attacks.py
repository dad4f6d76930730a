"""Attacks on the handshake. Each has a defence, and a mutation that removes the defence and lets the attack through."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import cbor2
import pytest
from tests.core.security_rig import BINDING, KEY, OTHER, dialler_takes, listener_takes, overheard

from cake_core.errors import AuthenticationError, ProtocolError
from cake_core.model import Batch, Row, Tensor, Want
from cake_core.security import handshake
from cake_core.security.handshake import MAGIC, MAX_HELLO, NONCE, Handshake
from cake_core.wire import cbor
from cake_core.wire.bodies import BodyReader
from cake_core.wire.cbor import load_map
from cake_core.wire.protocol import Message, Type, encode_batch

ME = bytes(NONCE)


def dialling(key=KEY, hello=b"attacker", binding=BINDING):
    return Handshake("dialler", key, hello, binding, secrets.token_bytes(NONCE))


def listening(key=KEY, hello=b"attacker", binding=BINDING):
    return Handshake("listener", key, hello, binding, secrets.token_bytes(NONCE))


def honest_dialler(machine, change=lambda frame: frame):
    """Plays a dialler, each frame changed on its way."""
    for frame in machine.open():
        yield change(frame)
    answer = yield None
    for frame in machine.receive(answer):
        yield change(frame)
    yield None


def honest_listener(machine, change=lambda frame: frame):
    for _ in range(2):
        heard = yield None
        for frame in machine.receive(heard):
            yield change(frame)


# The attacks: each asserts that it fails.


def wrong_key():
    assert not listener_takes(honest_dialler(dialling(OTHER)))
    assert not dialler_takes(dishonest_listener())


def dishonest_listener():
    """Takes any proof, and answers with one that is no good."""
    yield None
    yield MAGIC + b"\x02\x01" + ME + b"hello"
    yield None
    yield MAGIC + b"\x04" + bytes(32)


def reflected():
    def mirror():
        hello = yield None
        yield MAGIC + b"\x02" + hello[6:]
        proof = yield None
        yield MAGIC + b"\x04" + proof[6:]

    assert not dialler_takes(mirror())


def relayed():
    """The attacker's own connection to the listener has the listener's binding, the victim's to the attacker another."""
    real = listening()

    assert not dialler_takes(honest_listener(real), binding=b"certificate of the attacker")
    assert not real.done


def replayed():
    recorded = []
    assert listener_takes(honest_dialler(dialling(), lambda frame: recorded.append(frame) or frame))

    def again():
        yield recorded[0]
        yield None
        yield recorded[1]
        yield None

    assert not listener_takes(again())


def oracle():
    """What a second connection says to the first one's nonce is used as the proof on the first."""

    def first():
        yield MAGIC + b"\x01\x01" + ME + b"attacker"
        challenge = yield None

        def second():
            yield MAGIC + b"\x01\x01" + challenge[7 : 7 + NONCE] + b"attacker"
            yield None

        yield MAGIC + b"\x03" + overheard(second())[-1][-32:]
        yield None

    assert not listener_takes(first())


def changed_hello():
    """Somebody who can change bytes takes a capability away."""
    honest = dialling(hello=b"new and safe")
    assert not listener_takes(honest_dialler(honest, lambda frame: frame.replace(b"new and safe", b"old and weak")))


def insecure_peer():
    """No key, no proof: the attacker says it runs with --insecure, and hopes to be obeyed."""
    assert not listener_takes(honest_dialler(dialling(None)))
    assert not dialler_takes(honest_listener(listening(None)))


def other_format():
    assert not listener_takes(honest_dialler(dialling(), lambda frame: b"CAKE\x02" + frame[5:]))
    assert not dialler_takes(honest_listener(listening(), lambda frame: b"CAKE\x02" + frame[5:]))


def cut_proof():
    for length in (31, 16, 1):
        assert not listener_takes(honest_dialler(dialling(), lambda f, n=length: f[: 6 + n] if f[5] == 3 else f))


def cut_frames():
    """Every frame is cut at every place; the victim says ProtocolError and nothing else."""
    for length in range(6 + 1 + NONCE):
        with pytest.raises(ProtocolError):
            listening().receive(dialling().open()[0][:length])


def reordered():
    """The proof comes before the introduction, or the introduction twice."""
    with pytest.raises(ProtocolError):
        listening().receive(MAGIC + b"\x03" + bytes(32))
    with pytest.raises(ProtocolError):
        dialling().receive(MAGIC + b"\x04" + bytes(32))
    victim = listening()
    victim.receive(dialling().open()[0])
    with pytest.raises(ProtocolError):
        victim.receive(dialling().open()[0])


def giant_hello():
    with pytest.raises(ProtocolError):
        listening().receive(MAGIC + b"\x01\x01" + ME + bytes(MAX_HELLO + 1))


def early_body():
    """Data before the proof: not one byte of memory is handed out for it."""
    with pytest.raises(ProtocolError):
        handshake.refuse_body(b"header", 1 << 30)


def tagged_cbor():
    """A codec makes objects of tags: a regular expression of the peer's, for one."""
    with pytest.raises(ProtocolError):
        load_map(cbor2.dumps({"a": cbor2.CBORTag(4, [1, 2])}))


def deep_cbor():
    with pytest.raises(ProtocolError):
        load_map(b"\xa1\x61a" + b"\x81" * 100 + b"\x00")


def shape_and_length_that_disagree():
    tokens = Tensor("i32", (2,), bytes(8))
    header, _ = encode_batch(Type.FORWARD, 1, Batch((Row(1, 0, 2, Want()),), {"tokens": tokens}))
    with pytest.raises(ProtocolError):
        BodyReader(1 << 20).allocate(header, 9)


# The mutations: each removes one defence.

original = Handshake._proof


def proofs_are_not_compared(patch):
    patch.setattr(handshake.hmac, "compare_digest", lambda a, b: True)


def roles_are_left_out(patch):
    patch.setattr(Handshake, "_proof", lambda self, role, nonces, hellos: original(self, b"", nonces, hellos))


def the_binding_is_left_out(patch):
    def proof(self, role, nonces, hellos):
        self._binding = b""
        return original(self, role, nonces, hellos)

    patch.setattr(Handshake, "_proof", proof)


def nonces_are_not_random(patch):
    patch.setattr(handshake.secrets, "token_bytes", bytes)


def any_nonce_is_answered(patch):
    """The original's scheme: an HMAC of the other's nonce, given to whoever asks."""
    meet = Handshake._meet

    def proof(self, role, nonces, hellos):
        return hmac.digest(self._secret, nonces[role == b"dialler"], "sha256")

    def generous(self, payload):
        frames = meet(self, payload)
        return frames if self._dials else [*frames, MAGIC + b"\x04" + self._proofs[False]]

    patch.setattr(Handshake, "_proof", proof)
    patch.setattr(Handshake, "_meet", generous)


def hellos_are_left_out(patch):
    patch.setattr(Handshake, "_proof", lambda self, role, nonces, hellos: original(self, role, nonces, (b"", b"")))


def insecure_peers_are_obeyed(patch):
    meet = Handshake._meet

    def obliging(self, payload):
        if payload[:1] == b"\x00":
            self._mode, self._secret = b"\x00", handshake._INSECURE
        return meet(self, payload)

    patch.setattr(Handshake, "_meet", obliging)


def the_format_is_not_looked_at(patch):
    receive = Handshake.receive
    patch.setattr(Handshake, "receive", lambda self, frame: receive(self, MAGIC + frame[5:]))


def short_proofs_are_compared_as_far_as_they_go(patch):
    def verify(self, proof):
        self.done = self._proofs[not self._dials].startswith(proof)
        return []

    patch.setattr(Handshake, "_verify", verify)


def sizes_are_not_checked(patch):
    receive = Handshake.receive
    patch.setattr(Handshake, "receive", lambda self, frame: receive(self, frame.ljust(7 + NONCE, b"\x01")))


def any_order_will_do(patch):
    receive = Handshake.receive

    def patient(self, frame):
        self._expected = frame[5]
        return receive(self, frame)

    patch.setattr(Handshake, "receive", patient)


def hellos_may_be_of_any_size(patch):
    patch.setattr(handshake, "MAX_HELLO", 1 << 30)


def bodies_are_taken_from_strangers(patch):
    patch.setattr(handshake, "refuse_body", lambda header, length: memoryview(b""))


def cbor_goes_to_the_codec_unseen(patch):
    patch.setattr(cbor, "check_cbor", lambda data: None)


def the_declared_length_is_believed(patch):
    patch.setattr(Message, "body_length", property(lambda self: 9))


@dataclass(frozen=True)
class Case:
    attack: Callable[[], None]
    mutation: Callable[[pytest.MonkeyPatch], None]

    def __str__(self) -> str:
        return f"{self.attack.__name__}-{self.mutation.__name__}"


CASES = [
    Case(wrong_key, proofs_are_not_compared),
    Case(reflected, roles_are_left_out),
    Case(relayed, the_binding_is_left_out),
    Case(replayed, nonces_are_not_random),
    Case(oracle, any_nonce_is_answered),
    Case(changed_hello, hellos_are_left_out),
    Case(insecure_peer, insecure_peers_are_obeyed),
    Case(other_format, the_format_is_not_looked_at),
    Case(cut_proof, short_proofs_are_compared_as_far_as_they_go),
    Case(cut_frames, sizes_are_not_checked),
    Case(reordered, any_order_will_do),
    Case(giant_hello, hellos_may_be_of_any_size),
    Case(early_body, bodies_are_taken_from_strangers),
    Case(tagged_cbor, cbor_goes_to_the_codec_unseen),
    Case(deep_cbor, cbor_goes_to_the_codec_unseen),
    Case(shape_and_length_that_disagree, the_declared_length_is_believed),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.attack.__name__)
def test_the_attack_fails(case):
    case.attack()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_its_defence_the_attack_succeeds(case, monkeypatch):
    case.mutation(monkeypatch)
    # KeyError: the victim went on where it had nothing to go on with.
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        case.attack()


def test_two_honest_ends_agree():
    assert listener_takes(honest_dialler(dialling()))
    assert dialler_takes(honest_listener(listening()))
    assert listener_takes(honest_dialler(dialling(None)), key=None)
    dialler, listener = dialling(hello=b"d"), listening(hello=b"l")
    (hello,) = dialler.open()
    (challenge,) = listener.receive(hello)
    (proof,) = dialler.receive(challenge)
    (answer,) = listener.receive(proof)
    assert dialler.receive(answer) == []
    assert (dialler.done, listener.done) == (True, True)
    assert (dialler.peer_hello, listener.peer_hello) == (b"l", b"d")
    with pytest.raises(ProtocolError):
        dialler.receive(answer)


def test_the_reason_stays_here():
    """Each refusal is told to the local user with the remedy, whatever the wire shows."""
    victim, attacker = listening(), dialling(OTHER)
    (proof,) = attacker.receive(victim.receive(attacker.open()[0])[0])
    with pytest.raises(AuthenticationError, match="cake key show"):
        victim.receive(proof)
    with pytest.raises(AuthenticationError, match="it runs with --insecure"):
        listening().receive(dialling(None).open()[0])
    with pytest.raises(AuthenticationError, match="start this end without --insecure"):
        listening(None).receive(dialling().open()[0])
