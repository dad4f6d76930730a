"""Loaded components: what a node that holds `clip`, `unet` or `vae` does when it is called, in torch and over the wire.

`run` is the call in torch, used as it is by a master that holds the component itself; `call` is the contract of
`cake_core.model.Component` around it.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cake_core.errors import StageError
from cake_core.model import Memory, Tensor
from cake_sd.wire import NAMES, Packed, pack_results, to_wire, unpack

Arguments = Mapping[str, Any]
Results = dict[str, torch.Tensor]
Method = Callable[[int, Arguments], Results]


@dataclass(frozen=True, slots=True)
class About:
    """What a component tells of itself, for the master to compare with what it expects."""

    layer: str
    class_name: str
    config: str
    """Digest of the component's configuration."""
    dtype: str
    device: str
    lora: tuple[str, ...] = ()
    """`digest*scale` of each LoRA that was loaded into it."""

    def encode(self) -> torch.Tensor:
        text = json.dumps({name: getattr(self, name) for name in self.__slots__})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, tensor: torch.Tensor) -> About:
        """Raises StageError when the other end says something else."""
        try:
            values = json.loads(bytes(tensor.tolist()))
            return cls(**{**values, "lora": tuple(values["lora"])})
        except (ValueError, TypeError, KeyError) as error:
            raise StageError(
                "a component's description cannot be read; run the same version of cake-sd on every node"
            ) from error


class TorchComponent(ABC):
    """A module and the few methods it offers."""

    def __init__(self, about: About, module: torch.nn.Module) -> None:
        self.name = about.layer
        self.about = about
        self.module = module
        self.methods: dict[str, Method] = {"about": lambda _request, _arguments: {"about": about.encode()}}
        first = next(module.parameters())
        self.dtype, self.device = first.dtype, first.device

    def run(self, method: str, request: int, arguments: Arguments) -> Results:
        """Raises StageError for a method this component does not have."""
        function = self.methods.get(method)
        if function is None:
            raise StageError(f"{self.name} has no method {method!r}; it has {', '.join(self.methods)}")
        with torch.no_grad():
            return function(request, arguments)

    def call(
        self,
        method: str,
        request: int,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        packed = Packed(dict(tensors), dict(scalars), dict(constants))
        results = self.run(method, request, unpack(packed, self.device))
        return pack_results(results)

    def cast(self, arguments: Arguments, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments with tensors of `dtype`, the caller's, in ours; timesteps and ids of other types stay exact."""
        if dtype == self.dtype:
            return dict(arguments)
        return {name: _cast(value, dtype, self.dtype) for name, value in arguments.items()}

    @abstractmethod
    def close(self, request: int) -> None: ...

    def memory(self) -> Memory:
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return Memory(str(self.device), NAMES[self.dtype], weights)

    def shutdown(self) -> None:
        self.module.to("meta")


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, Mapping):
        return {key: _cast(item, source, target) for key, item in value.items()}
    if isinstance(value, list):
        return [_cast(item, source, target) for item in value]
    return value


class TextComponent(TorchComponent):
    """A text encoder. One output at a time leaves it: a pipeline uses one or two of its up to 33 hidden states."""

    def __init__(self, about: About, module: torch.nn.Module) -> None:
        super().__init__(about, module)
        self.methods |= {"encode": self._encode, "norm": self._norm}
        self._latest: dict[int, tuple[bytes, Any]] = {}

    def _encode(self, request: int, arguments: Arguments) -> Results:
        """`want` is `item:0`, `state:-2` (a hidden state) or `name:pooler_output`; the rest goes to the module."""
        inputs = {name: value for name, value in arguments.items() if name != "want"}
        output = self._forward(request, inputs)
        return {"output": _pick(self.name, output, str(arguments.get("want")))}

    def _forward(self, request: int, inputs: dict[str, Any]) -> Any:
        key = b"|".join(
            f"{name}{value.dtype}{tuple(value.shape)}".encode() + to_wire(value).data
            if isinstance(value, torch.Tensor)
            else f"{name}={value}".encode()
            for name, value in sorted(inputs.items())
        )
        latest = self._latest.get(request)
        if latest is None or latest[0] != key:
            latest = (key, self.module(**inputs, return_dict=True))
            self._latest[request] = latest
        return latest[1]

    def _norm(self, _request: int, arguments: Arguments) -> Results:
        """The encoder's last layer norm on its own, which a skip of CLIP layers applies to an earlier state."""
        text_model = getattr(self.module, "text_model", self.module)
        norm = getattr(text_model, "final_layer_norm", None)
        if norm is None:
            raise StageError(f"{self.name} has no final layer norm, so its layers cannot be skipped; leave clip_skip out")
        return {"output": norm(arguments["hidden"].to(self.dtype))}

    def close(self, request: int) -> None:
        self._latest.pop(request, None)


def _pick(layer: str, output: Any, want: str) -> torch.Tensor:
    kind, _, key = want.partition(":")
    try:
        value = output[int(key)] if kind == "item" else output.hidden_states[int(key)] if kind == "state" else output.get(key)
    except (IndexError, ValueError, TypeError) as error:
        raise StageError(f"{layer} has no output {want!r}; it is too short for this model's pipeline or clip_skip") from error
    if not isinstance(value, torch.Tensor):
        raise StageError(f"{layer} has no tensor {want!r} among its outputs")
    return value


class VaeComponent(TorchComponent):
    """An autoencoder: encodes to the moments of its distribution, so that the master draws, and decodes to 8-bit pixels."""

    def __init__(self, about: About, module: torch.nn.Module) -> None:
        super().__init__(about, module)
        self.methods |= {"encode": self._encode, "decode": self._decode}
        self._upcasts = bool(getattr(getattr(module, "config", None), "force_upcast", False))
        self._using = threading.Lock()
        """Held while the module computes: encoding may change its dtype for the while."""

    def _encode(self, _request: int, arguments: Arguments) -> Results:
        """In f32 where diffusers does: its SDXL pipelines hand a picture over in f32 to what says `force_upcast`."""
        x = arguments["x"]
        dtype = x.dtype if self._upcasts and x.dtype == torch.float32 else self.dtype
        with self._using:
            self.module.to(dtype)
            try:
                encoded: Any = self.module.encode(x.to(dtype))  # type: ignore[operator]
            finally:
                self.module.to(self.dtype)  # exactly what it was: f32 holds all of bf16
        if not hasattr(encoded, "latent_dist"):
            raise StageError(f"{self.about.class_name} does not encode to a distribution; it cannot start from an image")
        return {"moments": encoded.latent_dist.parameters}

    def _decode(self, _request: int, arguments: Arguments) -> Results:
        with self._using:
            decoded: Any = self.module.decode(arguments["z"].to(self.dtype), return_dict=False)  # type: ignore[operator]
        image = decoded[0]
        if not bool(torch.isfinite(image).all()):
            raise StageError(
                f"{self.name} decoded to values that are no numbers; {NAMES[self.dtype]} is the likely reason: load it with "
                "--dtype bf16 or f32, or give weights made for f16 with --sd-vae"
            )
        return {"image": to_pixels(image)}

    def close(self, request: int) -> None:
        """Nothing is kept between calls."""


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """Float [N, 3, H, W] in -1 .. 1 -> uint8 [N, H, W, 3], rounded exactly as diffusers does on its way to a picture file."""
    scaled = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    return (scaled * 255).round().to(torch.uint8).contiguous()
