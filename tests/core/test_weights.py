"""Transfers into the cache: killed, damaged, hostile, several at once; and what the cache keeps."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cake_core.bundle import layer_files
from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CapacityError, CheckpointError, NodeLost
from cake_core.filenames import is_safe_path
from cake_core.formats.subset import Image
from cake_core.model import Layer, LoadOptions, ModelInfo
from cake_core.resolve import open_path
from cake_core.testing.toy_gguf import write_toy_gguf
from cake_core.testing.toys import ToyTextBackend, write_toy_checkpoint
from cake_core.weights.manifest import PIECE, FileSpec, piece_digest
from cake_core.weights.packing import Packer, unpack
from cake_core.weights.store import Store
from cake_core.weights.supply import ImageSupply
from cake_core.weights.transfer import IN_FLIGHT, Transfer
from cake_core.weights.views import Views

SIZE = 10 * PIECE + 12_345


class Sender:
    """A source over images. `damage(piece)` may spoil what is sent; `sent` lists the pieces."""

    def __init__(self, supply: ImageSupply, name: str = "sender") -> None:
        self.name = name
        self.sent: list[tuple[str, int]] = []
        self.damage: Callable[[int], bool] = lambda piece: False
        self._supply = supply
        self._lock = threading.Lock()

    def has(self, file: str) -> bool:
        return bool(self._supply.holds([file]))

    def fetch(self, file: str, piece: int) -> tuple[bytes, memoryview]:
        digest, data = self._supply.piece(file, piece)
        with self._lock:
            self.sent.append((file, piece))
            spoilt = self.damage(piece)
        return digest, memoryview(bytes([data[0] ^ 1]) + data[1:] if spoilt else data)


def blob(seed: str, size: int = SIZE) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def offer(**files: bytes) -> tuple[tuple[FileSpec, ...], ImageSupply]:
    supply = ImageSupply()
    return supply.offer({f"{name}.bin": Image((data,)) for name, data in files.items()}), supply


def fetch(store: Store, files: tuple[FileSpec, ...], *senders: Sender) -> int:
    transfer = Transfer(store, files)
    for sender in senders:
        transfer.add(sender)
    return transfer.run()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_files_arrive_as_they_are_and_once(store: Store) -> None:
    files, supply = offer(one=blob("one"), two=blob("two", 5), empty=b"", same=blob("one"))
    assert fetch(store, files, Sender(supply)) == SIZE + 5
    for file, data in zip(files, (blob("one"), blob("two", 5), b"", blob("one")), strict=True):
        assert store.path(file.name).read_bytes() == data
    assert fetch(store, files, Sender(supply)) == 0


def test_several_sources_share_the_work(store: Store) -> None:
    files, supply = offer(one=blob("one"))
    senders = [Sender(supply, f"s{index}") for index in range(3)]
    fetch(store, files, *senders)
    assert store.path(files[0].name).read_bytes() == blob("one")
    assert sorted(piece for sender in senders for _, piece in sender.sent) == list(range(11))


def test_a_damaged_piece_is_noticed_and_fetched_again(store: Store) -> None:
    files, supply = offer(one=blob("one"))
    sender, spoilt = Sender(supply), iter([True])
    sender.damage = lambda piece: piece == 4 and next(spoilt, False)
    assert fetch(store, files, sender) == SIZE + PIECE
    assert store.path(files[0].name).read_bytes() == blob("one")
    assert [piece for _, piece in sender.sent].count(4) == 2


def test_a_source_that_only_sends_damage_is_given_up(store: Store) -> None:
    files, supply = offer(one=blob("one"))
    bad, good = Sender(supply, "bad"), Sender(supply, "good")
    bad.damage = lambda piece: True
    with pytest.raises(NodeLost, match="nobody sends the missing weights"):
        fetch(store, files, bad)
    fetch(store, files, bad, good)
    assert store.path(files[0].name).read_bytes() == blob("one")


@pytest.mark.parametrize("whole", [True, False], ids=["of a whole file", "of an unfinished file"])
def test_a_damaged_piece_on_disk_is_noticed_and_fetched_again(store: Store, whole: bool) -> None:
    files, supply = offer(one=blob("one"))
    sender = Sender(supply)
    transfer = Transfer(store, files)
    transfer.add(sender)
    if not whole:
        sender.damage = lambda piece: piece > 7 and (transfer.cancel(NodeLost("cut off")) or True)
        with pytest.raises(NodeLost):
            transfer.run()
    else:
        transfer.run()
    path = store.path(files[0].name)
    with (path if whole else path.with_name(f"{path.name}.part")).open("r+b") as file:
        file.seek(3 * PIECE + 77)
        file.write(b"damage")
    assert not store.has(files[0])
    again = Sender(supply)
    fetch(store, files, again)
    assert path.read_bytes() == blob("one")
    assert 3 in [piece for _, piece in again.sent]
    assert len(again.sent) == (1 if whole else 4)


CHILD = """
import os, sys, time
from pathlib import Path
from cake_core.weights.store import Store
from cake_core.weights.transfer import Transfer
from tests.core.test_weights import Sender, blob, offer

class Slow(Sender):
    def fetch(self, file, piece):
        os.write(1, b"%d\\n" % piece)
        time.sleep(0.03)
        return super().fetch(file, piece)

files, supply = offer(one=blob("one", {size}))
transfer = Transfer(Store(Path(sys.argv[1])), files)
transfer.add(Slow(supply, "a"))
transfer.add(Slow(supply, "b"))
transfer.run()
"""


def test_a_source_that_comes_too_late_is_not_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a transfer that is over waits for its threads: it would find some that have not started yet."""
    files, supply = offer(a=blob("a"))
    late = Sender(supply, "late")
    transfer = Transfer(store, files)
    transfer.add(Sender(supply))
    ended, added = threading.Event(), threading.Event()
    join, start = threading.Thread.join, threading.Thread.start

    def slow_join(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if thread.name == "cake-fetch":
            ended.set()
            added.wait(1.0)

    def slow_start(thread: threading.Thread) -> None:
        if ended.is_set():
            added.set()
            time.sleep(0.2)
        start(thread)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(threading.Thread, "join", slow_join)
        monkeypatch.setattr(threading.Thread, "start", slow_start)
        run = pool.submit(transfer.run)
        assert ended.wait(20.0)
        transfer.add(late)
        assert run.result(20.0) == SIZE
    assert not late.sent


def test_a_killed_transfer_goes_on_where_it_was(store: Store) -> None:
    """At most 4 MiB, the pieces that were on their way, are sent twice."""
    size = 24 * PIECE
    command = [sys.executable, "-c", CHILD.format(size=size), str(store.folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    first = [int(child.stdout.readline()) for _ in range(12)]
    child.send_signal(signal.SIGKILL)
    first += [int(line) for line in child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    assert len(first) < 24
    files, supply = offer(one=blob("one", size))
    sender = Sender(supply)
    fetch(store, files, sender)
    assert store.path(files[0].name).read_bytes() == blob("one", size)
    twice = set(first) & {piece for _, piece in sender.sent}
    assert len(twice) <= IN_FLIGHT
    assert IN_FLIGHT * PIECE == 4 << 20


def test_one_of_two_processes_fetches_and_the_other_waits(store: Store) -> None:
    files, supply = offer(one=blob("one"), two=blob("two"))
    senders = [Sender(supply), Sender(supply)]
    results: list[int] = []
    threads = [threading.Thread(target=lambda s=s: results.append(fetch(Store(store.folder), files, s))) for s in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(results) == 2 * SIZE
    assert sorted(piece for sender in senders for _, piece in sender.sent) == sorted(2 * list(range(11)))


def test_memory_stays_flat(store: Store, tmp_path: Path) -> None:
    """64 MiB from a file on disk, as a checkpoint's."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        for index in range(64):
            file.write(blob(str(index), PIECE))
    supply = ImageSupply()
    files = supply.offer({"big.bin": Image((TensorInfo("t", "U8", (64 * PIECE,), source, 0, 64 * PIECE),))})
    tracemalloc.start()
    try:
        fetch(store, files, Sender(supply), Sender(supply))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * PIECE
    assert supply.sent == 64 * PIECE


def test_a_full_disk_is_told_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 0, 9))
    files, supply = offer(one=blob("one"))
    with pytest.raises(CapacityError, match=r"0\.01 GB more, 0\.00 GB are free"):
        fetch(store, files, Sender(supply))


def test_links_that_somebody_put_into_the_cache_are_not_followed(store: Store, tmp_path: Path) -> None:
    files, supply = offer(one=blob("one", 100))
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").touch()
    store.files.mkdir(parents=True)
    name = files[0].name
    store.path(name).symlink_to(outside)
    (store.files / f"{name}.part").symlink_to(outside)
    views = Views(store)
    (store.folder / "models").mkdir()
    from cake_core.weights.manifest import view_name

    (store.folder / "models" / view_name(files)).symlink_to(folder)
    fetch(store, files, Sender(supply))
    laid = views.lay_out(files)
    assert outside.read_bytes() == b"precious"
    assert (folder / "file").exists()
    assert not laid.is_symlink()
    assert (laid / "one.bin").read_bytes() == blob("one", 100)
    (store.files / f"{name}.pieces").unlink()
    (store.files / f"{name}.pieces").symlink_to(outside)
    store.path(name).write_bytes(b"changed")
    with pytest.raises(OSError, match="symbolic"):
        store.has(files[0])
    assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["config.json", "unet/config.json", "a b.txt", "model-00001-of-00002.safetensors", "x"])
def test_paths_of_models_are_safe(path: str) -> None:
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../x", "a/../x", "/x", "a//b", "a/", "C:x", "C:\\x", "\\\\host\\x", "a\\b", "x\0", "x\n", "a/b/c", "-x",
     ".x", "x.", "x ", "aux", "LPT1.txt", "é", "x" * 129, None, 7],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_not(path: object) -> None:
    assert not is_safe_path(path)


def test_the_cache_is_pruned_of_what_was_used_longest_ago(store: Store) -> None:
    views = Views(store)
    kept, old = offer(a=blob("a", PIECE), common=blob("c", 10)), offer(b=blob("b", PIECE), common=blob("c", 10))
    for files, supply in (old, kept):
        views.announce(files, "model", "layers")
        fetch(store, files, Sender(supply))
        views.lay_out(files)
        time.sleep(0.02)
    assert [view.nbytes for view in views.list()] == [PIECE + 10] * 2
    assert views.nbytes() == 2 * PIECE + 10
    assert views.prune(3 * PIECE) == 0
    assert views.prune(2 * PIECE) == PIECE
    assert [view.files for view in views.list()] == [tuple(file.name for file in kept[0])]
    assert store.holds([file.name for file in old[0]]) == [old[0][1].name]
    assert views.prune(0, keep=[views.list()[0].name]) == 0
    assert views.prune(0) == PIECE + 10
    assert list(store.files.iterdir()) == []


def toy_gguf(folder: Path) -> tuple[Checkpoint, ModelInfo]:
    """Three tensors and a tied one, in types of which a file may not change a bit."""
    folder.mkdir()
    tensors = {
        "token_embd.weight": ("F32", (4, 8), bytes(range(128))),
        "blk.0.w.weight": ("Q8_0", (3, 32), bytes(reversed(range(102)))),
        "blk.1.w.weight": ("Q4_K", (1, 256), bytes(range(144))),
        "rope_freqs.weight": ("F32", (4,), bytes(16)),
    }
    write_toy_gguf(folder / "m.gguf", {"general.architecture": "llama", "general.alignment": 64}, tensors)
    layers = (
        Layer("model.embed_tokens", 128, ("token_embd.weight",)),
        Layer("model.layers.0", 1, ("blk.0.w.weight",)),
        Layer("model.layers.1", 1, ("blk.1.w.weight",)),
        Layer("lm_head", 1, ("token_embd.weight",)),
    )
    return open_path(folder / "m.gguf"), ModelInfo("b", "text", "m", "a", layers)


def toy_folder(folder: Path) -> tuple[Checkpoint, ModelInfo]:
    model = write_toy_checkpoint(folder)
    return model, ToyTextBackend().describe(model, LoadOptions())


@pytest.mark.parametrize("make", [toy_folder, toy_gguf], ids=["safetensors", "gguf"])
def test_every_choice_of_layers_makes_a_checkpoint(
    make: Callable[[Path], tuple[Checkpoint, ModelInfo]], store: Store, tmp_path: Path
) -> None:
    model, info = make(tmp_path / "toy")
    views = Views(store)
    names = [layer.name for layer in info.layers]
    received = 0
    for chosen in (names, names[:2], names[1:3], names[-1:]):
        supply = ImageSupply()
        files = supply.offer(layer_files(model, info, chosen))
        received += fetch(store, files, Sender(supply))
        opened = open_path(views.lay_out(files))
        held = {tensor for name in chosen for tensor in info.layer(name).tensors}
        assert held <= set(opened.tensors)
        assert opened.fingerprint(held) == model.fingerprint(held)
        assert {name: tensor.shape for name, tensor in opened.headers.items()} == {
            name: tensor.shape for name, tensor in model.tensors.items()
        }
    weights = sum(tensor.nbytes for tensor in model.tensors.values())
    assert received < weights + 20_000, "tensors travel once, whatever they are grouped with"


def test_fine_tunes_of_one_base_have_different_files(tmp_path: Path) -> None:
    info = None
    names = []
    for seed in (0, 1):
        model = write_toy_checkpoint(tmp_path / str(seed), seed=seed)
        info = ToyTextBackend().describe(model, LoadOptions())
        names.append({path: image.name() for path, image in layer_files(model, info, ["model.layers.1"]).items()})
    same = [path for path in names[0] if names[0][path] == names[1][path]]
    assert same
    assert not [path for path in same if path.endswith(".safetensors")]


def test_what_is_not_offered_is_not_given(store: Store) -> None:
    files, supply = offer(one=blob("one"))
    for name, piece in ((files[0].name, 11), ("0" * 64, 0), ("../../etc/passwd", 0)):
        with pytest.raises(CheckpointError, match="not offered"):
            supply.piece(name, piece)
    fetch(store, files, Sender(supply))
    assert store.read(files[0].name, 0)[0] == piece_digest(blob("one")[:PIECE])
    for name in ("0" * 64, "../../etc/passwd"):
        with pytest.raises(CheckpointError, match=r"not here|names no content"):
            store.read(name, 0)
    for piece in (11, 2**62):
        with pytest.raises(CheckpointError, match="no piece"):
            store.read(files[0].name, piece)


def test_the_cache_is_shown_pruned_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from cake_core.cli.main import make_cli
    from cake_core.plugins import Plugins

    monkeypatch.setenv("CAKE_CACHE_DIR", str(tmp_path))
    cli = make_cli(Plugins(entries=()))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["cache", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert "the cache is empty" in run("list")
    store = Store(tmp_path / "weights")
    files, supply = offer(a=blob("a", PIECE))
    Views(store).announce(files, "llama", "model.layers.0-3")
    assert "0 %" in run("list")
    fetch(store, files, Sender(supply))
    assert "model.layers.0-3  1.0 MB  complete" in run("list")
    assert '"bytes": 1048576' in run("list", "--json")
    assert "freed 0 B" in run("prune", "--max-size", "2MB")
    assert "freed 1.0 MB" in run("clear")
    assert CliRunner().invoke(cli, ["cache", "prune", "--max-size", "much"]).exit_code == 2


def test_pieces_are_packed_only_where_that_pays() -> None:
    pytest.importorskip("zstandard", reason="packing needs zstandard")
    packer = Packer()
    loose, tight = bytes(PIECE), blob("tight", PIECE)
    packed = packer.pack("loose", loose)
    assert packed is not None
    assert len(packed) < 1000
    assert unpack(memoryview(packed)) == loose
    assert packer.pack("tight", tight) is None
    assert packer.pack("tight", loose) is None, "a file that did not shrink is not tried again"


def test_packed_pieces_that_are_none_are_refused() -> None:
    zstandard = pytest.importorskip("zstandard", reason="packing needs zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * PIECE))
    for data in (b"", b"no frame", bomb, bomb[: len(bomb) // 2], zstandard.ZstdCompressor().compress(b"x" * 99)[:-3]):
        with pytest.raises(CheckpointError, match="piece"):
            unpack(memoryview(data))


def test_a_packed_piece_that_nobody_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cake_core.weights.packing.zstd", lambda: None)
    with pytest.raises(CheckpointError, match="nobody asked"):
        unpack(memoryview(b"anything"))
    assert Packer().pack("file", bytes(PIECE)) is None
