"""Bundles of split-model: what is in them, that a worker starts on one, and what is refused."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, ConfigError, TopologyError
from cake_core.events import TokenEvent
from cake_core.formats import subset
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.model import Layer, LoadOptions, ModelInfo
from cake_core.plugins import Plugins
from cake_core.requests import TextRequest
from cake_core.resolve import resolve
from cake_core.split import split
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toy_gguf import write_toy_gguf
from cake_core.testing.toys import ToyTextBackend, write_toy_checkpoint
from cake_core.topology import Topology, load_topology, parse_topology

TOPOLOGY = parse_topology({
    "one": {"host": "10.0.0.1:10128", "description": "ünder the desk", "layers": ["model.embed_tokens", "model.layers.0-1"]},
    "two": {"host": "[::1]:7", "layers": ["model.layers.2", "lm_head"]},
})  # fmt: skip


@pytest.fixture
def toy(tmp_path: Path) -> Checkpoint:
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    (tmp_path / "toy" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "toy" / "notes.md").write_text("not part of a model")
    return checkpoint


def describe(checkpoint: Checkpoint) -> ModelInfo:
    return ToyTextBackend().describe(checkpoint, LoadOptions())


def data_of(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_a_bundle_holds_the_workers_tensors_and_all_side_files(toy: Checkpoint, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    info = describe(toy)
    one, two = split(toy, info, TOPOLOGY, tmp_path / "out", progress=lambda *report: done.append(report))
    assert (one.node, one.folder, one.layers) == ("one", tmp_path / "out" / "one-node", TOPOLOGY.nodes[0].layers)
    assert sorted(path.name for path in (one.folder / "model").iterdir()) == [
        "absent.json", "config.json", "model.safetensors.index.json", "reduced.safetensors", "tokenizer.json",
    ]  # fmt: skip
    for bundle in (one, two):
        wanted = {name for layer in bundle.layers for name in info.layer(layer).tensors}
        index = json.loads((bundle.folder / "model" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == dict.fromkeys(sorted(wanted), "reduced.safetensors")
        opened = resolve(str(bundle.folder / "model"))
        assert opened is not None
        assert set(opened.tensors) == wanted
        assert bundle.nbytes == sum(tensor.nbytes for tensor in opened.tensors.values())
        for name in wanted:
            assert data_of(opened, name) == data_of(toy, name)
        assert opened.fingerprint(wanted) == toy.fingerprint(wanted)
    total = one.nbytes + two.nbytes
    assert done[-1] == (total, total)
    assert done == sorted(done)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one-node", "two-node"]


def test_the_topology_of_a_bundle_is_the_workers_part(toy: Checkpoint, tmp_path: Path) -> None:
    bundles = split(toy, describe(toy), TOPOLOGY, tmp_path)
    for bundle, node in zip(bundles, TOPOLOGY.nodes, strict=True):
        assert load_topology(bundle.folder / "topology.yml").nodes == (node,)
    assert "model.layers.0-1" in (bundles[0].folder / "topology.yml").read_text("utf-8")


def test_a_worker_loads_from_its_bundle_alone(toy: Checkpoint, tmp_path: Path) -> None:
    whole = describe(toy)
    (bundle,) = split(toy, whole, TOPOLOGY, tmp_path, ["two"])
    shutil.rmtree(toy.path)
    checkpoint = resolve(str(bundle.folder))
    assert checkpoint is not None
    backend = ToyTextBackend()
    info = backend.describe(checkpoint, LoadOptions())
    assert info.layers == whole.layers
    stage = backend.load(checkpoint, info, ["lm_head"], LoadOptions())
    assert stage.layers == ("lm_head",)
    stage.shutdown()


def test_a_master_with_nothing_to_compute_gets_a_bundle_without_weights(toy: Checkpoint, tmp_path: Path) -> None:
    info = describe(toy)
    names = [layer.name for layer in info.layers]
    layers = {"one": names[:3], "two": names[3:]}
    topology = parse_topology({name: {"host": "h:1", "layers": found} for name, found in layers.items()})
    *_, bundle = split(toy, info, topology, tmp_path / "out")
    assert (bundle.node, bundle.layers, bundle.tensors, bundle.nbytes) == ("master", (), 0, 0)
    assert sorted(path.name for path in (bundle.folder / "model").iterdir()) == ["absent.json", "config.json", "tokenizer.json"]
    assert load_topology(bundle.folder / "topology.yml").nodes == topology.nodes
    with LocalCluster(Plugins(entries=()), toy, MemoryTransport(), layers) as cluster:
        expected, got = (_answer(cluster, model) for model in (toy, resolve(str(bundle.folder))))
    assert expected == got
    assert len(got) == 5


def _answer(cluster: LocalCluster, model: Checkpoint | None) -> list[int]:
    assert model is not None
    cluster.checkpoint = model
    events = cluster.open_text().engine.generate(TextRequest((5, 6, 7), max_tokens=5, ignore_eos=True))
    return [event.token for event in events if isinstance(event, TokenEvent)]


def test_what_stays_with_the_master_is_split_when_asked_for(toy: Checkpoint, tmp_path: Path) -> None:
    (bundle,) = split(toy, describe(toy), TOPOLOGY, tmp_path, ["master"])
    assert (bundle.folder, bundle.layers) == (tmp_path / "master-node", ("model.layers.3", "model.norm"))
    opened = resolve(str(bundle.folder))
    assert opened is not None
    assert set(opened.tensors) == {name for layer in bundle.layers for name in describe(toy).layer(layer).tensors}


def test_a_single_file_takes_nothing_along_that_lies_beside_it(toy: Checkpoint, tmp_path: Path) -> None:
    """A file without configuration is one among others in a folder of downloads."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    shutil.copy(toy.path / "model.safetensors", downloads / "one.safetensors")
    (downloads / "letter.txt").write_text("dear")
    single = resolve(str(downloads / "one.safetensors"))
    assert single is not None
    (bundle,) = split(single, describe(toy), TOPOLOGY, tmp_path / "out", ["one"])
    names = sorted(path.name for path in (bundle.folder / "model").iterdir())
    assert names == ["absent.json", "model.safetensors.index.json", "reduced.safetensors"]


GGUF_TENSORS = {
    "token_embd.weight": ("F32", (4, 8), bytes(range(128))),
    "blk.0.w.weight": ("Q8_0", (3, 32), bytes(reversed(range(102)))),
    "blk.1.w.weight": ("Q4_K", (1, 256), bytes(range(144))),
    "output.weight": ("F16", (4, 8), bytes(range(64))),
    "rope_freqs.weight": ("F32", (4,), bytes(16)),
}
GGUF_INFO = ModelInfo("b", "text", "m", "a", (
    Layer("model.embed_tokens", 128, ("token_embd.weight",)),
    Layer("model.layers.0", 1, ("blk.0.w.weight",)),
    Layer("model.layers.1", 1, ("blk.1.w.weight",)),
    Layer("lm_head", 1, ("output.weight",)),
))  # fmt: skip
GGUF_TOPOLOGY = parse_topology({"w": {"host": "h:1", "layers": ["model.layers.0-1"]}})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gguf_bundle_is_one_gguf_file_with_all_metadata(tmp_path: Path, parts: int) -> None:
    metadata = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"], "general.alignment": 64}
    names = list(GGUF_TENSORS)
    for part in range(parts):
        own = {name: GGUF_TENSORS[name] for name in names[part::parts]}
        extra = {"split.no": part, "split.count": parts} if parts > 1 else {}
        suffix = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
        write_toy_gguf(tmp_path / f"m{suffix}.gguf", {**metadata, **extra}, own)
    source = resolve(str(tmp_path))
    assert isinstance(source, GgufCheckpoint)
    (bundle,) = split(source, GGUF_INFO, GGUF_TOPOLOGY, tmp_path / "out")
    assert sorted(path.name for path in (bundle.folder / "model").iterdir()) == ["absent.json", "reduced.gguf"]
    opened = GgufCheckpoint(bundle.folder / "model" / "reduced.gguf")
    assert set(opened.tensors) == {"blk.0.w.weight", "blk.1.w.weight", "rope_freqs.weight"}
    for name in opened.tensors:
        assert data_of(opened, name) == GGUF_TENSORS[name][2]
        assert replace(opened.tensors[name], file=source.path, offset=0) == replace(
            source.tensors[name], file=source.path, offset=0
        )
    assert opened.config["general.architecture"] == "llama"
    assert list(opened.config["tokenizer.ggml.tokens"]) == ["a", "b"]
    assert not any(key.startswith("split.") for key in opened.config)
    assert {name: header.shape for name, header in opened.headers.items()} == {n: t.shape for n, t in source.tensors.items()}


def test_a_diffusers_bundle_keeps_the_folders(tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    for component in ("unet", "text_encoder"):
        toy = write_toy_checkpoint(folder / component)
        toy.path.joinpath("model.safetensors").rename(folder / component / "model.fp16.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(
        json.dumps({"unet": ["d", "U"], "text_encoder": ["t", "C"], "scheduler": ["d", "S"]})
    )
    checkpoint = DiffusersCheckpoint(folder)
    layers = tuple(
        Layer(layer, 1, tuple(name for name in checkpoint.tensors if name.startswith(f"{component}/")), stateless=True)
        for layer, component in (("clip", "text_encoder"), ("unet", "unet"))
    )
    topology = parse_topology({"w": {"host": "h:1", "layers": ["unet"]}})
    (bundle,) = split(checkpoint, ModelInfo("sd", "image", "sd", "SD", layers), topology, tmp_path / "out")
    opened = resolve(str(bundle.folder))
    assert isinstance(opened, DiffusersCheckpoint)
    assert opened.components == ("unet",)
    assert opened.component_config("text_encoder") == checkpoint.component_config("text_encoder")
    assert (bundle.folder / "model" / "scheduler" / "scheduler_config.json").is_file()
    assert all(data_of(opened, name) == data_of(checkpoint, name) for name in opened.tensors)
    for name, tensor in opened.tensors.items():
        assert tensor.offset % 64 == checkpoint.tensors[name].offset % 64, "kernels may round by where a mapped tensor lies"


def test_an_existing_bundle_is_not_touched(toy: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "two-node").mkdir()
    (tmp_path / "two-node" / "mine").touch()
    with pytest.raises(ConfigError, match="two-node is there already"):
        split(toy, describe(toy), TOPOLOGY, tmp_path)
    assert not (tmp_path / "one-node").exists()
    assert [path.name for path in (tmp_path / "two-node").iterdir()] == ["mine"]


def test_a_failure_leaves_nothing_half_written(toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subset._read

    def full(tensor: TensorInfo, offset: int, length: int) -> bytes:
        if tensor is toy.tensors["lm_head.weight"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor, offset, length)

    monkeypatch.setattr(subset, "_read", full)
    with pytest.raises(CheckpointError, match=r"out is full: it filled up .* free space or choose another --output"):
        split(toy, describe(toy), TOPOLOGY, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one-node"]


def test_what_a_killed_split_left_is_cleared(toy: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".one-node.partial" / "model").mkdir(parents=True)
    split(toy, describe(toy), TOPOLOGY, tmp_path, ["one"])
    assert not (tmp_path / ".one-node.partial").exists()


def test_a_disk_that_is_too_small_is_noticed_before(toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 0, 9))
    with pytest.raises(CheckpointError, match=r"0\.00 GB are free"):
        split(toy, describe(toy), TOPOLOGY, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_cannot_be_made(toy: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        split(toy, describe(toy), TOPOLOGY, tmp_path / "file")


@pytest.mark.parametrize(
    ("topology", "workers", "message"),
    [
        (TOPOLOGY, ["three"], "has no node 'three'"),
        (parse_topology({"w": {"host": "h:1", "layers": []}}), [], "has no layers"),
        (parse_topology({"w": {"host": "h:1", "layers": ["model.layers.9"]}}), [], "does not have; did you mean"),
        (parse_topology({"a/b": {"host": "h:1", "layers": ["lm_head"]}}), [], "cannot name a folder"),
        (Topology(), [], "names no workers"),
    ],
)
def test_topologies_that_cannot_be_split(
    toy: Checkpoint, tmp_path: Path, topology: Topology, workers: list[str], message: str
) -> None:
    with pytest.raises(TopologyError, match=message):
        split(toy, describe(toy), topology, tmp_path / "out", workers)
    assert not (tmp_path / "out").exists()


def test_a_bundle_cannot_be_split_for_layers_it_lacks(toy: Checkpoint, tmp_path: Path) -> None:
    info = describe(toy)
    (bundle,) = split(toy, info, TOPOLOGY, tmp_path, ["one"])
    part = resolve(str(bundle.folder))
    assert part is not None
    with pytest.raises(CheckpointError, match="is it itself a bundle"):
        split(part, info, TOPOLOGY, tmp_path / "again", ["two"])


MEMORY = """
import resource, sys
from pathlib import Path
from cake_core.model import Layer, ModelInfo
from cake_core.plugins import Plugins
from cake_core.requests import TextRequest
from cake_core.resolve import resolve
from cake_core.split import split
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport
from cake_core.topology import parse_topology
checkpoint = resolve(sys.argv[1])
info = ModelInfo("b", "text", "m", "a", (Layer("lm_head", 1, tuple(checkpoint.tensors)),))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
split(checkpoint, info, parse_topology({"w": {"host": "h:1", "layers": ["lm_head"]}}), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(resource, "getrusage"), reason="needs getrusage")
def test_memory_stays_flat(tmp_path: Path) -> None:
    size = 96 << 20
    header = json.dumps({"w": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    command = [sys.executable, "-c", MEMORY, str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 16 << 20
    assert (tmp_path / "out" / "w-node" / "model" / "reduced.safetensors").stat().st_size > size
