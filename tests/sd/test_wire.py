"""What crosses nodes: bytes a step at real sizes, constants once, and tensors that come back as they went."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cake_core.errors import ProtocolError
from cake_core.events import ImageDone
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.model import LoadOptions, Memory, Tensor
from cake_core.requests import ImageRequest
from cake_sd.backend import SdBackend
from cake_sd.components import About
from cake_sd.loading import config_digest
from cake_sd.wire import Packed, Packer, from_wire, pack_results, to_wire, uniform, unpack, unpack_results

EMOJI = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"

KILO = 1000
SIZES = {
    # images.md: latents in (one half of the guided batch), noise out, embeddings and other constants, picture as 8-bit RGB
    "sd15": (512, 32.8, 65.5, 236.5, 786.4),
    "sdxl": (1024, 131.0, 262.0, 631.0 + 5.1, 3145.7),
}


@dataclass
class Hollow:
    """A component of real shapes that computes nothing: what it is sent and what it answers have the real sizes."""

    name: str
    config: Mapping[str, Any]
    class_name: str
    calls: list[tuple[str, int, int, dict[str, int]]] = field(default_factory=list)

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        results = {name: to_wire(value) for name, value in self.answer(method, tensors, scalars).items()}
        known = {name + str(hash(bytes(tensor.data))): tensor.nbytes for name, tensor in constants.items()}
        sent, got = (sum(tensor.nbytes for tensor in group.values()) for group in (tensors, results))
        self.calls.append((method, sent, got, known))
        return results

    def answer(self, method: str, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        half = torch.float16
        if method == "about":
            return {"about": About(self.name, self.class_name, config_digest(self.config), "f16", "cpu").encode()}
        if method == "encode":
            width = self.config["projection_dim"] if scalars["want"] == "item:0" and "2" in self.name else None
            shape = (1, width) if width else (1, 77, self.config["hidden_size"])
            return {"output": torch.rand(shape).to(half)}
        if method == "forward":
            _, channels, height, width = tensors["sample"].shape
            return {"output": torch.rand(2, channels, height, width).to(half)}
        _, _, height, width = tensors["z"].shape
        return {"image": torch.zeros(1, 8 * height, 8 * width, 3, dtype=torch.uint8)}

    def close(self, request: int) -> None: ...

    def memory(self) -> Memory:
        return Memory("cpu", "f16", 0)

    def shutdown(self) -> None: ...


def _real_size(folder: Path, family: str) -> Path:
    """A folder without weights whose configurations have the published shapes."""
    shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "generation_config.json"))
    index = json.loads((folder / "model_index.json").read_text())
    clip = json.loads((folder / "text_encoder/config.json").read_text())
    unet: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    vae |= {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.18215,
    }
    clip |= {"hidden_size": 768, "num_attention_heads": 12, "projection_dim": 768}
    if family == "sdxl":
        unet |= {
            "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [5, 10, 20],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        }  # fmt: skip
        second = {**clip, "hidden_size": 1280, "num_attention_heads": 20, "projection_dim": 1280}
        second["architectures"] = ["CLIPTextModelWithProjection"]
        (folder / "text_encoder_2").mkdir()
        (folder / "text_encoder_2/config.json").write_text(json.dumps(second))
        shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
        index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
        for name in ("safety_checker", "requires_safety_checker"):
            index.pop(name)
    for name, config in (("text_encoder", clip), ("unet", unet), ("vae", vae)):
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("family", SIZES)
def test_bytes_a_step_are_those_of_what_changes(tmp_path: Path, family: str) -> None:
    size, sample, noise, constants, picture = SIZES[family]
    checkpoint = DiffusersCheckpoint(_real_size(tmp_path / family, family))
    backend, options = SdBackend(), LoadOptions(dtype="f16", device="cpu")
    info = backend.describe(checkpoint, options)
    hollow = {
        layer.name: Hollow(layer.name, checkpoint.component_config(folder) or {}, "Hollow")
        for layer in info.layers
        for folder in [{"clip": "text_encoder", "clip2": "text_encoder_2"}.get(layer.name, layer.name)]
    }
    painter = backend.assemble(checkpoint, info, {name: [part] for name, part in hollow.items()}, options)
    events: list[Any] = []
    request = ImageRequest("a castle", "rain", size, size, steps=4, guidance=5.0, seed=1)
    painter.generate(request, events.append, lambda: False)

    steps = [call for call in hollow["unet"].calls if call[0] == "forward"]
    assert len(steps) == 4
    for _, sent, received, _ in steps:
        assert sent == pytest.approx(sample * KILO, rel=0.1)
        assert received == pytest.approx(noise * KILO, rel=0.1)
    once = {key: nbytes for call in steps for key, nbytes in call[3].items()}
    assert sum(once.values()) == pytest.approx(constants * KILO, rel=0.1)
    assert len({frozenset(call[3]) for call in steps}) == 1, "the same constants at each step"
    (decode,) = [call for call in hollow["vae"].calls if call[0] == "decode"]
    assert decode[2] == pytest.approx(picture * KILO, rel=0.1)
    assert [event.width for event in events if isinstance(event, ImageDone)] == [size]


def test_a_loop_beside_the_unet_sends_latents_once(model: Any, cluster: Any) -> None:
    request = ImageRequest("a red apple", "grey", 64, 64, steps=8, guidance=5.0, seed=1)
    stepwise, looping = cluster(model("sd15"), ("unet",)), cluster(model("sd15"), ("unet",), loop="worker")
    stepwise.paint(request)
    looping.paint(request)
    (per_step,), (once,) = stepwise.wires["unet"], looping.wires["unet"]
    latents = 4 * 16 * 16 * 4
    assert per_step.received == 2 * latents * per_step.methods.count("forward")
    assert once.received == latents + 8 * 3 * (once.methods.count("loop_next") - 1)
    assert once.sent == 0
    assert once.constants == per_step.constants


def test_text_encoders_send_one_state_of_many(model: Any, cluster: Any) -> None:
    made = cluster(model("sdxl"), ("clip", "clip2"))
    made.paint(ImageRequest("a red apple", "grey", 64, 64, steps=1, seed=1))
    (first,), (second,) = made.wires["clip"], made.wires["clip2"]
    state = 77 * 32 * 4
    assert second.received == 2 * (state + 32 * 4), "penultimate state and pooled output of two prompts"
    assert first.received == 2 * (state + state)
    again = (first.calls, second.calls)
    made.paint(ImageRequest("a red apple", "grey", 64, 64, steps=1, seed=2))
    assert (first.calls, second.calls) == again, "the same prompts are not encoded again"


def test_what_components_on_the_master_get_is_not_converted(model: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cluster(model("sd15"))
    for name in ("to_wire", "from_wire"):
        monkeypatch.setattr(f"cake_sd.wire.{name}", lambda *_: pytest.fail("a local call was converted"))
    made.paint(ImageRequest("a red apple", width=64, height=64, steps=1))
    components = [part for (part,) in made.components.values()]
    assert all(part.module is not None and part.device.type == "cpu" for part in components)


VALUES = [
    torch.arange(12, dtype=torch.float32).reshape(3, 4),
    torch.randn(2, 3).to(torch.bfloat16),
    torch.tensor([True, False]),
    torch.tensor(5, dtype=torch.int64),
    torch.zeros(0, 4),
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).chunk(2, dim=1)[0],
    torch.randn(4, 4).t(),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.dtype}{list(v.shape)}")
def test_tensors_come_back_as_they_went(value: torch.Tensor) -> None:
    back = unpack_results(pack_results({"value": value}), "cpu")["value"]
    assert back.dtype == value.dtype
    assert torch.equal(back, value)
    assert (back.ndim == 4 and back.stride(1) == 1) == (value.ndim == 4 and value.stride(1) == 1)


def test_arguments_come_back_as_they_went() -> None:
    arguments = {
        "sample": torch.randn(1, 4, 2, 2), "timestep": torch.tensor(981), "t": torch.tensor([0.25, 0.25], dtype=torch.bfloat16),
        "added": {"text_embeds": torch.randn(2, 9), "none": None}, "states": [torch.randn(3), 1.5, "x"], "flag": True,
        "empty": {},
    }  # fmt: skip
    packer = Packer(frozenset({"sample"}))
    packed = packer.pack(arguments)
    assert set(packed.tensors) == {"sample"}
    assert set(packed.constants) == {"added/text_embeds", "states/0"}
    back = unpack(packed, "cpu")
    assert back.keys() == arguments.keys()
    assert torch.equal(back["sample"], arguments["sample"])
    assert (back["timestep"].shape, back["timestep"].dtype, back["timestep"].item()) == ((), torch.int64, 981)
    assert (back["t"].dtype, back["t"].tolist()) == (torch.bfloat16, [0.25, 0.25])
    assert torch.equal(back["added"]["text_embeds"], arguments["added"]["text_embeds"])
    assert back["added"]["none"] is None
    assert back["states"][1:] == [1.5, "x"]
    assert (back["flag"], back["empty"]) == (True, {})


def test_the_wire_form_of_a_constant_is_one_object() -> None:
    packer, value = Packer(frozenset()), torch.randn(3)
    first = packer.pack({"embeds": value}).constants["embeds"]
    assert packer.pack({"embeds": value}).constants["embeds"] is first
    assert packer.pack({"embeds": value.clone()}).constants["embeds"] is first


def test_a_tensor_changed_in_place_is_another_constant() -> None:
    packer, value = Packer(frozenset()), torch.randn(3)
    first = bytes(packer.pack({"embeds": value}).constants["embeds"].data)
    value.add_(1)
    assert torch.equal(from_wire(packer.pack({"embeds": value}).constants["embeds"]), value)
    assert bytes(packer.pack({"embeds": value - 1}).constants["embeds"].data) is not first


def test_what_keeps_changing_is_no_constant() -> None:
    packer = Packer(frozenset())
    packed = [packer.pack({"residual": torch.full((70,), float(k))}) for k in range(8)]
    assert [bool(p.constants) for p in packed] == [True] * Packer.MAX_VALUES + [False] * (8 - Packer.MAX_VALUES)
    assert all(torch.equal(unpack(p, "cpu")["residual"], torch.full((70,), float(k))) for k, p in enumerate(packed))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(torch.full((2, 3), 0.5), 0.5), (torch.tensor(7), 7), (torch.arange(3), None), (torch.zeros(0), None),
     (torch.tensor([float("nan")] * 2), None), (torch.zeros(100), None)],
)  # fmt: skip
def test_uniform_tensors_travel_as_numbers(value: torch.Tensor, expected: float | None) -> None:
    assert uniform(value) == expected


@pytest.mark.parametrize(
    "packed",
    [
        Packed(scalars={"x": {"map": ["missing"]}}),
        Packed(scalars={"x": {"list": 2}, "x/0": 1}),
        Packed(scalars={"x": {"fill": ["f99", [1], 0]}}),
        Packed(scalars={"x": {"eval": "1"}}),
        Packed(tensors={"x@channels_last": Tensor("f32", (1,), bytes(4))}),
        Packed(tensors={"x": Tensor("f8e4m3", (1,), bytes(1))}),
    ],
)
def test_nonsense_from_a_peer_is_refused(packed: Packed) -> None:
    with pytest.raises(ProtocolError):
        unpack(packed, "cpu")


def test_what_cannot_cross_is_refused() -> None:
    with pytest.raises(ProtocolError, match="cannot cross"):
        Packer(frozenset()).pack({"x": object()})
    with pytest.raises(ProtocolError, match="does not cross"):
        to_wire(torch.zeros(100, dtype=torch.complex64))
