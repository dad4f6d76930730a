"""Names that others give and that become paths here: each place, with every name that leads elsewhere on some system.

Each place has a defence, a mutation that removes it, and a name with which the attack then really gets out of its folder. Not
here, because no name of others becomes a path there: GGUF metadata (parts are named after the file that was named), pictures
sent to the API (base64 only: tests/server/test_images.py), `cake cache` (it lists its own folder).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.core.farm import describe

from cake_core import assignment, checkpoint, hub, models, split
from cake_core.assignment import Assignment
from cake_core.checkpoint import SafetensorsCheckpoint
from cake_core.errors import CakeError
from cake_core.formats import diffusers
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.hub import needed_files
from cake_core.model import LoadOptions
from cake_core.models import HubId, cached, remove, snapshot
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import Node, Topology
from cake_core.weights import manifest, store, views
from cake_core.weights.manifest import parse_files
from cake_core.weights.store import Store
from cake_core.weights.views import Views

CONTENT = "0" * 64
SECRET = b"\x10\0\0\0\0\0\0\0{}              "
"""Also a safetensors file without tensors."""

HOSTILE = {
    "parent": "..", "folder itself": ".", "nothing": "", "beside": "../x", "through": "a/../../x", "absolute": "/etc/x",
    "drive": "C:x", "drive and root": "C:\\x", "backslash": "..\\x", "share": "\\\\host\\share\\x", "nul": "x\0", "line": "x\n",
    "device": "nul", "device with suffix": "LPT1.txt", "shortened": "x.", "long": "x" * 300, "half a character": "\ud800",
    "overlay": "a//x", "stream": "x:y",
}  # fmt: skip


# The places: each does with the name what Cake does, and says whether that got out of the folder it belongs in.


def manifest_of_a_peer(folder: Path, name: str) -> bool:
    cache = Store(folder / "cache")
    cache.files.mkdir(parents=True)
    cache.path(CONTENT).write_bytes(b"123")
    Views(cache).lay_out(parse_files([[name, CONTENT, 3, 3]]))
    return (folder / "outside" / "x").exists()


def content_that_a_peer_asks_for(folder: Path, name: str) -> bool:
    cache = Store(folder / "cache")
    cache.files.mkdir(parents=True)
    return cache.read(name, 0)[1] == SECRET


def options_of_an_assignment(_folder: Path, name: str) -> bool:
    fields = Assignment("m", "model", "image", (("unet",),), LoadOptions(), ()).as_fields()
    asked = Assignment.from_fields({**fields, "options": {**fields["options"], "extra": {"sd_lora": name}}})
    return asked.options.extra["sd_lora"] == name


def index_of_shards(folder: Path, name: str) -> bool:
    inside = folder / "model"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    return any(outside(folder, file) for file in SafetensorsCheckpoint(inside)._files())


def index_of_a_component(folder: Path, name: str) -> bool:
    unet = folder / "model" / "unet"
    unet.mkdir(parents=True)
    (unet / "x.safetensors").write_bytes(SECRET)
    (unet / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    return any(outside(folder, file) for file in DiffusersCheckpoint(unet.parent).component_files("unet"))


def component_of_a_model_index(folder: Path, name: str) -> bool:
    inside = folder / "model"
    inside.mkdir()
    (inside / "model_index.json").write_text(json.dumps({name: ["l", "C"]}))
    model = DiffusersCheckpoint(inside)
    return any(outside(folder, file) for component in model.components for file in model.component_files(component))


def listing_of_a_hub(_folder: Path, name: str) -> bool:
    listed = ["model_index.json", "unet/x.safetensors", f"{name}/x.json", f"unet/{name}.json"]
    return any(".." in found.split("/") for found in needed_files(HubId("org/m"), listed))


def revision_in_the_cache_of_the_hub(_folder: Path, name: str) -> bool:
    refs = HubId("org/m").folder / "refs"
    refs.mkdir(parents=True)
    (refs.parent / "snapshots").mkdir()
    (refs / "main").write_bytes(name.encode("utf-8", "surrogatepass"))
    return snapshot(HubId("org/m")) is not None


def file_of_a_hub_id(folder: Path, name: str) -> bool:
    refs = HubId("org/m").folder / "snapshots" / "abc"
    refs.mkdir(parents=True)
    hub_id = HubId.parse(f"org/m/{name}")
    found = None if hub_id is None else cached(hub_id)
    return found is not None and outside(folder, found.path)


def node_of_a_bundle(folder: Path, name: str) -> bool:
    model = write_toy_checkpoint(folder / "toy")
    nodes = (Node(name, None, ("lm_head",), ""),)
    split.split(model, describe(model), Topology(nodes), folder / "bundles", [name])
    return (folder / "outside" / "x-node").exists()


def outside(folder: Path, file: Path) -> bool:
    return file.resolve().is_relative_to((folder / "outside").resolve())


# The mutations: each removes one defence.


def any_file_name_will_do(module: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, "is_file_name", lambda name: True)


def paths_of_a_manifest_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifest, "is_safe_path", lambda path: True)


def content_names_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "is_name", lambda name: True)


def options_may_be_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(assignment, "_options", lambda values: LoadOptions(extra=values["extra"]))


def hub_ids_may_have_any_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models, "_HUB_ID", re.compile(r"(org/m)()/(.*)"))


@dataclass(frozen=True)
class Case:
    """`escape` is a name that leads from the place to the folder `outside`; `told` is in the refusal, None where a name of this
    kind is only passed over."""

    place: Callable[[Path, str], bool]
    mutation: Callable[[pytest.MonkeyPatch], None]
    escape: str
    told: str | None

    def __str__(self) -> str:
        return self.place.__name__


CASES = [
    Case(manifest_of_a_peer, paths_of_a_manifest_are_not_checked, "../../../outside/x", "no path inside a model's folder"),
    Case(content_that_a_peer_asks_for, content_names_are_not_checked, "../../outside/x.safetensors", "names no content"),
    Case(options_of_an_assignment, options_may_be_text, "../outside/x.safetensors", "impossible options"),
    Case(index_of_shards, any_file_name_will_do(checkpoint), "../outside/x.safetensors", "cannot be a file beside it"),
    Case(index_of_a_component, any_file_name_will_do(checkpoint), "../../outside/x.safetensors", "cannot be a file beside it"),
    Case(component_of_a_model_index, any_file_name_will_do(diffusers), "../outside", "cannot be a folder beside it"),
    Case(listing_of_a_hub, any_file_name_will_do(hub), "..", None),
    Case(revision_in_the_cache_of_the_hub, any_file_name_will_do(models), "../../../outside", None),
    Case(file_of_a_hub_id, hub_ids_may_have_any_file, "../../../../outside/x.safetensors", None),
    Case(node_of_a_bundle, any_file_name_will_do(split), "../outside/x", "cannot name a folder"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the places work; beside them `outside`, with a file that nobody here may read, and none may be added to."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.safetensors").write_bytes(SECRET)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("kind", [*HOSTILE, "really out"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_name_that_leads_elsewhere_is_refused(case: Case, kind: str, folder: Path) -> None:
    name = HOSTILE.get(kind, case.escape)
    if case.told is None:
        try:
            assert not case.place(folder, name)
        except CakeError as error:
            assert "do not trust it" in str(error)  # noqa: PT017 - or nothing is raised
    else:
        with pytest.raises(CakeError, match=case.told):
            case.place(folder, name)
    assert [path.name for path in (folder / "outside").iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_its_defence_the_attack_succeeds(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.mutation(monkeypatch)
    assert case.place(folder, case.escape)


# Links: the name is good, but what is there under it leads elsewhere.


def link_in_the_cache_of_weights(folder: Path) -> bool:
    """Somebody with an account on the machine puts a link where a peer will ask for content."""
    cache = Store(folder / "cache")
    cache.files.mkdir(parents=True)
    cache.path(CONTENT).symlink_to(folder / "outside" / "x.safetensors")
    try:
        return cache.read(CONTENT, 0)[1] == SECRET
    except CakeError:
        return False


def link_in_the_place_of_a_model(folder: Path) -> bool:
    cache = Store(folder / "cache")
    cache.files.mkdir(parents=True)
    cache.path(CONTENT).write_bytes(b"123")
    files = parse_files([["config.json", CONTENT, 3, 3]])
    (cache.folder / "models").mkdir()
    (cache.folder / "models" / manifest.view_name(files)).symlink_to(folder / "outside")
    Views(cache).lay_out(files)
    return not (folder / "outside" / "x.safetensors").exists()


def link_to_a_file_of_the_users(folder: Path) -> bool:
    """Who links a file of their own into the hub's cache does not want `cake rm` to delete it."""
    inside = HubId("org/m").folder / "snapshots" / "abc"
    inside.mkdir(parents=True)
    (inside / "x.safetensors").symlink_to(folder / "outside" / "x.safetensors")
    (inside / "config.json").write_text("{}")
    remove("org/m/x.safetensors")
    assert not (inside / "x.safetensors").is_symlink()
    return not (folder / "outside" / "x.safetensors").exists()


def links_are_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "is_regular", Path.is_file)


def links_to_folders_are_followed(patch: pytest.MonkeyPatch) -> None:
    def remove_behind(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        folder.unlink()

    patch.setattr(views, "_remove", remove_behind)


def everything_is_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "is_relative_to", lambda self, other: True)


LINKS = [
    (link_in_the_cache_of_weights, links_are_followed),
    (link_in_the_place_of_a_model, links_to_folders_are_followed),
    (link_to_a_file_of_the_users, everything_is_in_the_cache),
]


@pytest.mark.parametrize("attack", [attack for attack, _ in LINKS])
def test_a_link_leads_nobody_elsewhere(attack: Callable[[Path], bool], folder: Path) -> None:
    assert not attack(folder)


@pytest.mark.parametrize(("attack", "mutation"), LINKS)
def test_without_its_defence_the_link_is_followed(
    attack: Callable[[Path], bool],
    mutation: Callable[[pytest.MonkeyPatch], None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    assert attack(folder)
