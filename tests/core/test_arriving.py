"""A model that is opened and read while its files are on their way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.core.test_weights import Sender, blob

from cake_core.bundle import layer_files
from cake_core.checkpoint import Checkpoint
from cake_core.errors import Cancelled, CapacityError, CheckpointError, NodeLost
from cake_core.model import Layer, ModelInfo
from cake_core.resolve import open_path
from cake_core.testing.toy_checkpoint import write_safetensors
from cake_core.weights.arriving import Arriving
from cake_core.weights.manifest import PIECE, FileSpec
from cake_core.weights.store import Store
from cake_core.weights.supply import ImageSupply
from cake_core.weights.transfer import Transfer
from cake_core.weights.views import Views

# Not in the order of their names, as layers 2 and 10 are not.
LAYERS = ("first", "second", "a third")
SIZE = 3 * PIECE + 5


class Rig:
    """A model of three layers of four pieces, and a transfer of it. `held` says of a piece of weights whether it waits for
    `freed`."""

    def __init__(self, folder: Path) -> None:
        self.values = {name: blob(name, SIZE) for name in LAYERS}
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        tensors = {name: ("U8", (SIZE,), self.values[name]) for name in sorted(LAYERS)}
        write_safetensors(folder / "model" / "model.safetensors", tensors)
        source = open_path(folder / "model")
        info = ModelInfo("b", "text", "m", "a", tuple(Layer(name, SIZE, (name,)) for name in LAYERS))
        self.store, self.supply = Store(folder / "cache"), ImageSupply()
        self.files = self.supply.offer(layer_files(source, info, LAYERS))
        weights = [file for file in self.files if file.path.endswith(".safetensors")]
        self.places = {file.name: place for place, file in enumerate(weights)}
        self.views = Views(self.store)
        self.transfer = Transfer(self.store, self.files)
        self.sender = Sender(self.supply)
        self.held: Callable[[int, int], bool] = lambda layer, piece: False
        self.freed = threading.Event()
        self.gone = False

    name = "rig"

    def has(self, file: str) -> bool:
        return True

    def fetch(self, file: str, piece: int) -> tuple[bytes, memoryview]:
        if file in self.places and piece and self.held(self.places[file], piece):
            assert self.freed.wait(20)
            if self.gone:
                raise NodeLost("the sender has gone")
        return self.sender.fetch(file, piece)

    def arriving(self) -> Arriving:
        self.transfer.add(self)
        return Arriving(self.transfer, self.views, self.files, "m")

    def read(self, checkpoint: Checkpoint, layer: str, start: int = 0, stop: int = SIZE) -> bool:
        data = bytearray(stop - start)
        checkpoint.read_into(checkpoint.tensors[layer], start, memoryview(data))
        return bytes(data) == self.values[layer][start:stop]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_headers_come_first(rig: Rig) -> None:
    rig.held = lambda layer, piece: True
    with rig.arriving() as arriving:
        checkpoint = arriving.headers()
        assert checkpoint.tensors.keys() == set(LAYERS)
        assert rig.read(checkpoint, "a third", 0, 100), "the piece with its header has come with it"
        rig.freed.set()


def test_layers_are_read_in_their_order_while_later_ones_come(rig: Rig) -> None:
    rig.held = lambda layer, piece: layer == 2
    with rig.arriving() as arriving:
        checkpoint = arriving.headers()
        assert rig.read(checkpoint, "first")
        assert rig.read(checkpoint, "second")
        assert not arriving.over
        rig.freed.set()
        assert rig.read(checkpoint, "a third")
        arriving.finish()
    weights = [(rig.places[file], piece) for file, piece in rig.sender.sent if file in rig.places]
    assert sorted(weights) == [(layer, piece) for layer in range(3) for piece in range(4)]


def test_a_damaged_piece_is_not_handed_out(rig: Rig) -> None:
    spoilt = iter([True, True])
    rig.sender.damage = lambda piece: piece == 2 and next(spoilt, False)
    with rig.arriving() as arriving:
        checkpoint = arriving.headers()
        assert all(rig.read(checkpoint, layer) for layer in LAYERS)


def read_late(rig: Rig, checkpoint: Checkpoint, errors: list[Exception]) -> threading.Thread:
    """Waits in a thread for a layer that does not come."""

    def read() -> None:
        try:
            rig.read(checkpoint, "a third")
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("lost", [True, False], ids=["the source is lost", "another assignment comes"])
def test_who_waits_is_told_what_ended_the_transfer(rig: Rig, lost: bool) -> None:
    rig.held = lambda layer, piece: layer == 2
    errors: list[Exception] = []
    expected: type[Exception] = NodeLost if lost else Cancelled
    with rig.arriving() as arriving:
        thread = read_late(rig, arriving.headers(), errors)
        rig.gone = lost
        if not lost:
            rig.transfer.cancel(Cancelled("another assignment came"))
        rig.freed.set()
        thread.join(20)
        with pytest.raises(expected):
            arriving.finish()
    assert [type(error) for error in errors] == [expected]


def test_loading_that_fails_ends_the_transfer_and_what_came_stays(rig: Rig) -> None:
    rig.held = lambda layer, piece: layer == 2

    def load() -> None:
        with rig.arriving() as arriving:
            assert rig.read(arriving.headers(), "first")
            rig.freed.set()
            raise CapacityError("too big")

    with pytest.raises(CapacityError, match="too big"):
        load()
    before = len(rig.sender.sent)
    rig.transfer = Transfer(rig.store, rig.files)
    with rig.arriving() as arriving:
        assert all(rig.read(arriving.headers(), layer) for layer in LAYERS), "laid out anew, or over what was there"
        arriving.finish()
    first = next(name for name, place in rig.places.items() if place == 0)
    assert first not in [file for file, _ in rig.sender.sent[before:]]
    assert all(rig.read(open_path(rig.views.lay_out(rig.files)), layer) for layer in LAYERS)


def test_headers_that_cannot_come_are_an_error_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "incoming", refused)
    with pytest.raises(CheckpointError, match="cannot be fetched: PermissionError"), rig.arriving() as arriving:
        arriving.headers()


def test_what_was_laid_out_early_stays_right(rig: Rig) -> None:
    with rig.arriving() as arriving:
        path = arriving.headers().path
        arriving.finish()
    before = {file.path: (path / file.path).stat().st_ino for file in rig.files}
    assert rig.views.lay_out(rig.files) == path
    assert before == {file.path: (path / file.path).stat().st_ino for file in rig.files}
    assert all(rig.read(open_path(path), layer) for layer in LAYERS)


@pytest.mark.skipif(os.name == "nt", reason="there nothing is opened early")
def test_where_there_are_no_links_it_is_opened_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", none)
    with rig.arriving() as arriving:
        checkpoint = arriving.headers()
        assert arriving.over
        assert all(rig.read(checkpoint, layer) for layer in LAYERS)


def test_a_header_that_is_said_to_be_shorter_is_a_damaged_one(rig: Rig) -> None:
    """A master that lies about how much must be there to open a file harms nobody but itself."""
    rig.files = tuple(FileSpec(file.path, file.name, file.nbytes, 0) for file in rig.files)
    rig.transfer = Transfer(rig.store, rig.files)
    rig.fetch = never  # type: ignore[assignment,method-assign]
    with pytest.raises(CheckpointError), rig.arriving() as arriving:
        arriving.headers().tensors  # noqa: B018 - reads them


def never(_file: str, _piece: int) -> tuple[bytes, memoryview]:
    raise CheckpointError("not here")
