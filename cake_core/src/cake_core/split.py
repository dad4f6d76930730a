"""Cuts a model into bundles: for each worker a folder it can be started on as it is, and one for the master.

::

    OUTPUT/NAME-node/topology.yml     the worker's part of the topology
    OUTPUT/NAME-node/model/           its tensors at their own width, configuration, tokenizer,
                                      and absent.json, the headers of the model's other tensors
    OUTPUT/master-node/               the same for the master: the whole topology, and what no worker has

Bytes are copied piece by piece, never converted, and a bundle appears under its name only when it is whole.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cake_core.checkpoint import ABSENT, Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, ConfigError, TopologyError
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.formats.gguf import GgufCheckpoint
from cake_core.formats.subset import Copied, write_gguf, write_safetensors
from cake_core.model import ModelInfo, Progress
from cake_core.placement import Placement, place
from cake_core.topology import MASTER, Node, Topology, compress

SUFFIX = "-node"
PARTIAL = ".partial"
REDUCED = "reduced"
INDEX = "model.safetensors.index.json"
SMALL = 1 << 20
"""Tensors that no layer claims (tables of frequencies) go into every bundle when they are at most this long, in bytes."""

_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_SIDE_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """One node's folder: `nbytes` of `tensors` tensors for `layers`."""

    node: str
    folder: Path
    layers: tuple[str, ...]
    tensors: int
    nbytes: int


def split(
    checkpoint: Checkpoint,
    model: ModelInfo,
    topology: Topology,
    output: Path,
    workers: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Bundle]:
    """Writes one bundle for each of `workers` (`master` may be among them), or for every node of the topology, and then for
    the master too when nothing but configuration and tokenizers stays with it.

    Everything is checked before anything is written; a bundle that fails half-way is removed.

    Raises:
        TopologyError: a worker or a layer that there is not, or a worker without layers.
        ConfigError: a bundle of that name is there already, or the output cannot be written.
        CheckpointError: the model cannot be read, or the disk is full.
    """
    placement = place(model, topology)
    if not topology.nodes:
        raise TopologyError(f"{topology.source or 'the topology'} names no workers; there is nothing to split")
    bare = () if placement.layers_of(MASTER) else (MASTER,)
    names = workers or (*(node.name for node in topology.nodes), *bare)
    nodes = [topology.nodes if name == MASTER else (topology.node(name),) for name in names]
    bundles = [_plan(checkpoint, model, placement, name, output) for name in names]
    total = sum(bundle.nbytes for bundle, _ in bundles)
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free
        if total > free:
            raise _disk_full(output, f"the bundles take {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        copied = _Counter(progress, total)
        for (bundle, tensors), listed in zip(bundles, nodes, strict=True):
            _write(checkpoint, bundle, tensors, topology_text(listed), copied)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(output, "it filled up while a bundle was written") from error
        raise ConfigError(f"cannot write to {error.filename or output}: {error.strerror}") from error
    return [bundle for bundle, _ in bundles]


class _Counter:
    """Turns pieces into progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _disk_full(output: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the disk of {output} is full: {why}; free space or choose another --output")


def _plan(
    checkpoint: Checkpoint, model: ModelInfo, placement: Placement, name: str, output: Path
) -> tuple[Bundle, dict[str, TensorInfo]]:
    """What goes into a node's bundle. Raises before anything is written."""
    folder = output / f"{name}{SUFFIX}"
    if Path(name).name != name or name in (".", ".."):
        raise TopologyError(f"node {name!r} cannot name a folder; use letters, digits, '-' and '_'")
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} is there already; delete it or choose another --output")
    layers = placement.layers_of(name)
    if not layers and name != MASTER:
        raise TopologyError(f"node {name!r} has no layers, so there is nothing to put into a bundle; give it some")
    claimed = {name for layer in model.layers for name in layer.tensors}
    wanted = {tensor for layer in layers for tensor in model.layer(layer).tensors}
    tensors = {
        tensor_name: tensor
        for tensor_name, tensor in checkpoint.tensors.items()
        if tensor_name in wanted
        or (tensor_name not in claimed and tensor.nbytes <= SMALL and not isinstance(checkpoint, DiffusersCheckpoint))
    }
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(f"{checkpoint.path} lacks {', '.join(missing[:3])}; is it itself a bundle? split the whole model")
    return Bundle(name, folder, layers, len(tensors), sum(t.nbytes for t in tensors.values())), tensors


def _write(checkpoint: Checkpoint, bundle: Bundle, tensors: Mapping[str, TensorInfo], topology: str, copied: Copied) -> None:
    """Writes beside the final name and renames: what has the name is whole."""
    partial = bundle.folder.with_name(f".{bundle.folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a split that was killed
    try:
        model = partial / "model"
        model.mkdir(parents=True)
        (partial / "topology.yml").write_text(topology, "utf-8")
        absent = {t.name: [t.dtype, t.shape, t.nbytes] for t in checkpoint.headers.values() if t.name not in tensors}
        (model / ABSENT).write_text(json.dumps(absent), "utf-8")
        if isinstance(checkpoint, GgufCheckpoint):
            write_gguf(model / f"{REDUCED}.gguf", checkpoint, list(tensors), copied)
        elif isinstance(checkpoint, DiffusersCheckpoint):
            _write_diffusers(checkpoint, model, tensors, copied)
        else:
            if tensors:
                _write_index(model / INDEX, dict.fromkeys(tensors, f"{REDUCED}.safetensors"), bundle.nbytes)
                write_safetensors(model / f"{REDUCED}.safetensors", tensors, copied)
            _copy_configuration(checkpoint.path, model)
        partial.rename(bundle.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def topology_text(nodes: Sequence[Node]) -> str:
    """A topology of these nodes alone, as YAML."""
    import yaml

    entries: dict[str, object] = {}
    for node in nodes:
        entry: dict[str, object] = {} if node.host is None else {"host": str(node.host).removeprefix("tcp://")}
        if node.description:
            entry["description"] = node.description
        entries[node.name] = {**entry, "layers": compress(node.layers)}
    return str(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))


def _write_index(path: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)}, indent=2), "utf-8")


def _write_diffusers(checkpoint: DiffusersCheckpoint, model: Path, tensors: Mapping[str, TensorInfo], copied: Copied) -> None:
    """The same files in the same folders, weights cut to the tensors; configurations of all components."""
    _copy_side_files(checkpoint.path, model)
    for folder in sorted(path for path in checkpoint.path.iterdir() if path.is_dir() and not path.name.startswith(".")):
        _copy_side_files(folder, model / folder.name)
    by_file: dict[Path, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, {})[name.partition("/")[2]] = tensor
    for file, inside in by_file.items():
        write_safetensors(model / file.parent.name / file.name, inside, copied)
    for index in sorted({found for file in by_file for found in file.parent.glob("*.safetensors.index*.json")}):
        listed = {n: f.name for f, inside in by_file.items() if f.parent == index.parent for n in inside}
        _write_index(
            model / index.parent.name / index.name, listed, sum(tensors[f"{index.parent.name}/{n}"].nbytes for n in listed)
        )


def _copy_configuration(source: Path, target: Path) -> None:
    """What lies beside the weights. A single file that needs nothing beside it lies among things that are not its own."""
    if source.is_dir() or (source.parent / "config.json").is_file():
        _copy_side_files(source if source.is_dir() else source.parent, target)


def _copy_side_files(source: Path, target: Path) -> None:
    """Configuration, tokenizer and their like; the index is written anew."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in _SIDE_SUFFIXES]
    wanted: Iterable[Path] = (
        f for f in files if f.name != ABSENT and ".index." not in f.name and f.stat().st_size <= _SIDE_LIMIT
    )
    target.mkdir(exist_ok=True)
    for file in wanted:
        shutil.copyfile(file, target / file.name)
