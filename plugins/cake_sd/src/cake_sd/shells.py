"""Shells: components of a diffusers pipeline that look like the real ones and compute elsewhere.

A shell is an instance of a subclass of the real class, built from `config.json` on torch's meta device (no weights), so every
pipeline finds the attributes and passes the type checks it is written with; `forward`, `encode` and `decode` go to `call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from cake_core.errors import RequestError
from cake_sd.components import Arguments, Results
from cake_sd.layout import Kind

Call = Callable[[str, Arguments], Results]
"""`call(method, arguments)` of the component that a shell stands for."""


class Decoded(Exception):
    """Raised out of a pipeline when it asks to decode: `z` is what the autoencoder is to be given.

    What a pipeline does after decoding (denormalise, watermark, make PIL images) is done once, where the decoder is.
    """

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__("the latents are ready")
        self.z = z


class Shell:
    """Mixed into the real class in front of it."""

    _cake_call: Call
    _cake_dtype: torch.dtype
    _cake_device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """One for all shells, the denoiser's: pipelines make latents and embeddings in it."""
        return self._cake_dtype

    @property
    def device(self) -> torch.device:
        return self._cake_device

    def to(self, *_args: Any, **_kwargs: Any) -> Shell:
        """Nothing moves: the weights are where the topology put them, in the dtype they were loaded in."""
        return self


class TextShell(Shell):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> LazyOutput:
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        layers = getattr(self.config, "num_hidden_layers", 0)  # type: ignore[attr-defined]
        return LazyOutput(self._cake_call, {"input_ids": input_ids, **kwargs}, layers)


class LazyOutput:
    """A text encoder's output whose tensors are fetched when a pipeline takes them, once each."""

    def __init__(self, call: Call, inputs: dict[str, Any], layers: int) -> None:
        self._call, self._inputs = call, inputs
        self._found: dict[str, torch.Tensor] = {}
        self._states = LazyStates(self.fetch, layers + 1) if inputs.get("output_hidden_states") else None

    def fetch(self, want: str) -> torch.Tensor:
        if want not in self._found:
            self._found[want] = self._call("encode", {**self._inputs, "want": want})["output"]
        return self._found[want]

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return self._states if key == -1 and self._states is not None else self.fetch(f"item:{key}")

    @property
    def hidden_states(self) -> LazyStates | None:
        return self._states

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.fetch(f"name:{name}")


class LazyStates:
    """`hidden_states`: as long as the real tuple, holding only what is asked for."""

    def __init__(self, fetch: Callable[[str], torch.Tensor], length: int) -> None:
        self._fetch, self._length = fetch, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -self._length <= index < self._length:
            raise RequestError(f"this text encoder has {self._length - 1} layers; skip fewer with clip_skip", "clip_skip")
        return self._fetch(f"state:{index if index < 0 else index - self._length}")

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self._length))


class FinalNorm:
    """Stands for `text_encoder.text_model`, of which pipelines use nothing but the last norm (with clip_skip).

    diffusers looks for it there although newer transformers no longer have that level.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def final_layer_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._call("norm", {"hidden": hidden})["output"]


class DenoiserShell(Shell):
    _cake_parameters: tuple[str, ...]

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._cake_parameters, args, strict=False)), **kwargs}
        output = self._cake_call("forward", {name: value for name, value in arguments.items() if value is not None})["output"]
        return Sample(output) if return_dict else (output,)


class Sample:
    """What a denoiser returns when a pipeline wants no tuple."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.sample,)[index]


class VaeShell(Shell):
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        distribution = DiagonalGaussianDistribution(self._cake_call("encode", {"x": x})["moments"])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        raise Decoded(z)


_MIXINS: Mapping[Kind, type[Shell]] = {"text": TextShell, "denoiser": DenoiserShell, "vae": VaeShell}

_REFUSED = (
    "save_pretrained", "load_lora_adapter", "fuse_qkv_projections", "unfuse_qkv_projections", "fuse_lora",
    "enable_tiling", "enable_slicing", "enable_freeu", "set_attn_processor", "enable_parallelism", "enable_cache",
)  # fmt: skip


def build_shell(
    kind: Kind, real: type[Any], config: Mapping[str, Any], call: Call, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A shell of class `real` with the configuration of its `config.json`. Holds no weights."""
    from accelerate import init_empty_weights

    mixin = _MIXINS[kind]
    body: dict[str, Any] = {"__module__": real.__module__, "__qualname__": real.__qualname__}
    body |= {name: _refuse(name) for name in _REFUSED if hasattr(real, name)}
    if kind == "denoiser":
        body["_cake_parameters"] = tuple(inspect.signature(real.forward).parameters)[1:]
    subclass: Any = type(real.__name__, (mixin, real), body)
    with init_empty_weights():
        if hasattr(real, "config_class") and real.config_class is not None:
            module = subclass(real.config_class.from_dict(dict(config)))
        else:
            module = subclass.from_config(dict(config))
    module.eval().requires_grad_(False)
    module._cake_call, module._cake_dtype, module._cake_device = call, dtype, device
    if kind == "text":
        module._modules.pop("text_model", None)
        object.__setattr__(module, "text_model", FinalNorm(call))
    return module  # type: ignore[no-any-return]


def _refuse(name: str) -> Callable[..., Any]:
    def refused(*_args: Any, **_kwargs: Any) -> Any:
        raise RequestError(f"{name} would act on a component without weights; set it on the node that holds it")

    return refused


def settle(pipeline: Any) -> Any:
    """Makes a pipeline over shells quiet: no progress bar, and nothing to upcast, since an autoencoder that overflows in f16
    was loaded in f32. The pipeline still believes it did and hands f32 latents to it, as diffusers does."""
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "upcast_vae"):
        pipeline.upcast_vae = lambda: None
    return pipeline
