"""Cuts a model into bundles: for each worker a folder it can be started on as it is, and one for the master.

::

    OUTPUT/NAME-node/topology.yml     the worker's part of the topology
    OUTPUT/NAME-node/model/           its tensors at their own width, configuration, tokenizer,
                                      and absent.json, the headers of the model's other tensors
    OUTPUT/master-node/               the same for the master: the whole topology, and what no worker has

Bytes are copied piece by piece, never converted (`narrowed` makes a quantised copy first), and a bundle appears under its name
only when it is whole.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cake_core.bundle import bundle_files, tensors_of
from cake_core.checkpoint import Checkpoint, TensorInfo
from cake_core.errors import CheckpointError, ConfigError, TopologyError
from cake_core.filenames import is_file_name
from cake_core.formats.subset import Copied
from cake_core.model import Backend, ModelInfo, Narrowing, Progress
from cake_core.placement import Placement, place
from cake_core.topology import MASTER, Node, Topology, compress

SUFFIX = "-node"
PARTIAL = ".partial"


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


@contextmanager
def narrowed(backend: Backend, checkpoint: Checkpoint, quantize: str | None, output: Path) -> Iterator[Checkpoint]:
    """The checkpoint, or while the block runs a quantised copy of it beside the bundles. Raises ConfigError where the backend
    makes none."""
    if quantize is None:
        yield checkpoint
        return
    if not isinstance(backend, Narrowing):
        raise ConfigError(f"{backend.name} models are not split with --quantize; leave it out")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quantised-", dir=output) as folder:
        yield backend.narrow(checkpoint, quantize, Path(folder))


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
    if not is_file_name(name) or not is_file_name(folder.name):
        raise TopologyError(f"node {name!r} cannot name a folder; use letters, digits, '-' and '_'")
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} is there already; delete it or choose another --output")
    layers = placement.layers_of(name)
    if not layers and name != MASTER:
        raise TopologyError(f"node {name!r} has no layers, so there is nothing to put into a bundle; give it some")
    tensors = tensors_of(checkpoint, model, layers)
    return Bundle(name, folder, layers, len(tensors), sum(t.nbytes for t in tensors.values())), tensors


def _write(checkpoint: Checkpoint, bundle: Bundle, tensors: Mapping[str, TensorInfo], topology: str, copied: Copied) -> None:
    """Writes beside the final name and renames: what has the name is whole."""
    partial = bundle.folder.with_name(f".{bundle.folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a split that was killed
    try:
        model = partial / "model"
        model.mkdir(parents=True)
        (partial / "topology.yml").write_text(topology, "utf-8")
        for name, image in bundle_files(checkpoint, tensors).items():
            (model / name).parent.mkdir(exist_ok=True)
            image.write(model / name, copied)
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
