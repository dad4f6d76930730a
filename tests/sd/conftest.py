"""Tiny diffusers pipelines with random weights, built offline, and the plumbing to run them whole and in parts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from cake_core.events import ImageDone  # noqa: E402
from cake_core.formats.diffusers import DiffusersCheckpoint  # noqa: E402
from cake_core.model import LoadOptions, Memory, Tensor  # noqa: E402
from cake_core.requests import ImageRequest  # noqa: E402
from cake_sd.backend import SdBackend  # noqa: E402
from cake_sd.loading import dtype_argument  # noqa: E402
from cake_sd.quiet import auto_pipeline, quieten  # noqa: E402

EMOJI = Path(__file__).parents[2] / "plugins/cake_emoji/src/cake_emoji/model"
BACKEND = SdBackend()
FAMILIES = ("sd15", "sd21", "sdxl", "turbo", "sd3", "flux", "pixart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """torch's arrays and numpy 2 disagree about a keyword, inside diffusers: not ours to fix."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning"))


@pytest.fixture(scope="session")
def kit() -> Any:
    """This module, whose helpers tests cannot import by a name."""
    return sys.modules[__name__]


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    quieten()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by its family, made at first use."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            torch.manual_seed(0)
            BUILDERS[family]().save_pretrained(folder)
        return folder

    return get


@dataclass
class Wire:
    """What went over a fake wire, in bytes: `constants` counts each content once a request, as core sends it."""

    calls: int = 0
    sent: int = 0
    constants: int = 0
    received: int = 0
    methods: list[str] = field(default_factory=list)


class FakeRemote:
    """A component behind a wire: everything is turned into bytes on the way, as between two processes."""

    waits = True
    seconds = 0.0

    def __init__(self, component: Any, wire: Wire, node: str, rejoin: float) -> None:
        self.name = component.name
        self.node, self.rejoin = node, rejoin
        self.wire = wire
        self._component = component
        self._known: dict[int, dict[bytes, Tensor]] = {}
        self.before: Callable[[str], None] = lambda _method: None

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        self.before(method)
        self.wire.calls += 1
        self.wire.methods.append(method)
        known = self._known.setdefault(request, {})
        kept = {}
        for name, tensor in constants.items():
            key = bytes(tensor.data) + str((tensor.dtype, tensor.shape)).encode()
            if key not in known:
                known[key] = _copy(tensor)
                self.wire.constants += tensor.nbytes
            kept[name] = known[key]
        self.wire.sent += sum(tensor.nbytes for tensor in tensors.values())
        sent = {name: _copy(tensor) for name, tensor in tensors.items()}
        results = self._component.call(method, request, sent, cbor2.loads(cbor2.dumps(dict(scalars))), kept)
        self.wire.received += sum(tensor.nbytes for tensor in results.values())
        return {name: _copy(tensor) for name, tensor in results.items()}

    def close(self, request: int) -> None:
        self._known.pop(request, None)
        self._component.close(request)

    def memory(self) -> Memory:
        return self._component.memory()

    def shutdown(self) -> None:
        self._component.shutdown()


def _copy(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, tensor.shape, bytes(tensor.data))


@dataclass
class Cluster:
    """An assembled model, its components, and the wires of the remote ones by layer (and replica)."""

    painter: Any
    components: dict[str, list[Any]]
    wires: dict[str, list[Wire]]

    def paint(self, request: ImageRequest) -> list[bytes]:
        return [event.rgb for event in self.events(request) if isinstance(event, ImageDone)]

    def events(self, request: ImageRequest, cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
        events: list[Any] = []
        self.painter.generate(request, events.append, cancelled)
        return events


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """`cluster(folder, remote=("unet",), dtype="f32", replicas={"unet": 2}, **options)`: the model with these layers remote,
    each replica on a node of its own unless `node` names one for all."""
    made: list[Cluster] = []

    def make(
        folder: Path,
        remote: tuple[str, ...] = (),
        dtype: str = "f32",
        replicas: Mapping[str, int] | None = None,
        master: Path | None = None,
        node: str = "",
        rejoin: float = 30.0,
        **extra: Any,
    ) -> Cluster:
        options = LoadOptions(dtype=dtype, device="cpu", extra={f"sd_{key}": value for key, value in extra.items()})
        checkpoint = DiffusersCheckpoint(folder)
        info = BACKEND.describe(checkpoint, options)
        components: dict[str, list[Any]] = {}
        wires: dict[str, list[Wire]] = {}
        for layer in info.layers:
            count = (replicas or {}).get(layer.name, 1)
            loaded = [BACKEND.load(checkpoint, info, layer.name, options) for _ in range(count)]
            if layer.name in remote:
                wires[layer.name] = [Wire() for _ in loaded]
                loaded = [
                    FakeRemote(c, wire, node or f"{layer.name}-{index}", rejoin)
                    for index, (c, wire) in enumerate(zip(loaded, wires[layer.name], strict=True))
                ]
            components[layer.name] = loaded
        home = DiffusersCheckpoint(master or folder)
        painter = BACKEND.assemble(home, BACKEND.describe(home, options), components, options)
        made.append(Cluster(painter, components, wires))
        for found in wires.values():  # what assembling asked is not part of any request
            for wire in found:
                wire.__init__()  # type: ignore[misc]
        return made[-1]

    yield make
    for one in made:
        one.painter.shutdown()


def plain(folder: Path, dtype: str = "f32") -> Any:
    """The whole diffusers pipeline in this process: the oracle."""
    from diffusers import DiffusionPipeline

    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, **dtype_argument(DiffusionPipeline, kinds[dtype])
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_to_image(pipeline: Any) -> Any:
    found = auto_pipeline().AutoPipelineForImage2Image.from_pipe(pipeline)
    found.set_progress_bar_config(disable=True)
    return found


def pictures(pipeline: Any, seed: int, **call: Any) -> list[bytes]:
    """RGB bytes of what a pipeline paints from one seed."""
    result = pipeline(generator=torch.Generator("cpu").manual_seed(seed), output_type="pil", **call)
    return [image.tobytes() for image in result.images]


def weightless(folder: Path, target: Path) -> Path:
    """A copy of a model folder without a single weight: configurations, tokenizers, scheduler."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


# Tiny models. Widths are small, structure is that of the real ones.


def _clip(projection: bool = False, width: int = 32, layers: int = 3, act: str = "quick_gelu") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2811, hidden_size=width, intermediate_size=37, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width, hidden_act=act, bos_token_id=2809, eos_token_id=2810,
        pad_token_id=2810,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(EMOJI / "tokenizer"))


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [chr(code) for code in range(97, 123)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    return T5EncoderModel(config).eval(), tokenizer


def _vae(channels: int = 4, **extra: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(16, 16, 32), layers_per_block=1,
        norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        **extra,
    ).eval()  # fmt: skip


def _unet(cross: int = 32, **extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=extra.pop("in_channels", 4), out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, cross_attention_dim=cross, norm_num_groups=8, attention_head_dim=extra.pop("heads", 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **extra,
    ).eval()  # fmt: skip


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _sd15() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **_BETAS)
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=_clip_tokenizer(), unet=_unet(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd21() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **_BETAS
    )
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(act="gelu"), tokenizer=_clip_tokenizer(), scheduler=scheduler, safety_checker=None,
        unet=_unet(use_linear_projection=True, heads=(2, 4)), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _xl(scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = _unet(
        64, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, heads=(2, 4), transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True, scaling_factor=0.13025), text_encoder=_clip(), text_encoder_2=_clip(True, act="gelu"),
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler

    return _xl(EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **_BETAS))


def _turbo() -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    return _xl(EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **_BETAS))


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    t5, t5_tokenizer = _t5()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=_clip(True),
        text_encoder_2=_clip(True, act="gelu"), text_encoder_3=t5, tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(),
        tokenizer_3=t5_tokenizer,
        vae=_vae(4, shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    t5, t5_tokenizer = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=_clip(), text_encoder_2=t5, tokenizer=_clip_tokenizer(), tokenizer_2=t5_tokenizer,
        vae=_vae(4, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


def _pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    t5, t5_tokenizer = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return PixArtAlphaPipeline(
        transformer=transformer, scheduler=DPMSolverMultistepScheduler(), text_encoder=t5, tokenizer=t5_tokenizer, vae=_vae()
    )


BUILDERS: Mapping[str, Callable[[], Any]] = {
    "sd15": _sd15, "sd21": _sd21, "sdxl": _sdxl, "turbo": _turbo, "sd3": _sd3, "flux": _flux, "pixart": _pixart,
}  # fmt: skip
