"""Loads the component of one layer from a diffusers folder, or from a file given in its place."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cake_core.checkpoint import TensorInfo
from cake_core.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModel
from cake_core.formats.diffusers import DiffusersCheckpoint
from cake_core.formats.safetensors import read_header, read_headers
from cake_core.model import LoadOptions, ModelInfo, Progress
from cake_sd import randoms
from cake_sd.components import About, TextComponent, TorchComponent, VaeComponent
from cake_sd.denoiser import DenoiserComponent
from cake_sd.layout import FOLDERS, KINDS, component_class, component_config
from cake_sd.options import SdOptions
from cake_sd.quiet import quieten
from cake_sd.single import SingleFileCheckpoint, component_tensors, load_tensors
from cake_sd.wire import DTYPES, NAMES

_LOADING = threading.Lock()
"""transformers and diffusers exchange torch's initialisers while they load, so two loads at once leave modules without data."""

_LIBRARIES = ("diffusers", "transformers")
_VOLATILE = ("_diffusers_version", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")


def resolve_class(checkpoint: DiffusersCheckpoint, layer: str) -> type[Any]:
    """The class that the model index names for a layer. Only model classes of diffusers and transformers are taken."""
    entry = component_class(checkpoint, FOLDERS[layer])
    if entry is None:
        raise ConfigError(f"{checkpoint.path}: model_index.json lists no {FOLDERS[layer]}, so there is no layer {layer!r}")
    library, name = entry
    found = getattr(importlib.import_module(library), name, None) if library in _LIBRARIES else None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise UnsupportedModel(
            f"{checkpoint.path}: {FOLDERS[layer]} wants {library}.{name}, which is not here; a newer {library} may have it"
        )
    return found


def resolve_device(options: LoadOptions) -> torch.device:
    """Raises ConfigError for a device this machine does not have."""
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


def resolve_dtype(options: LoadOptions, device: torch.device) -> torch.dtype:
    """bf16 where the GPU has it, else f16; f32 on a CPU, where halves are no faster without special instructions."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def config_digest(config: Mapping[str, Any]) -> str:
    """Equal for the same architecture, whatever saved it."""
    relevant = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def load_component(
    checkpoint: DiffusersCheckpoint, info: ModelInfo, layer: str, options: LoadOptions, sd: SdOptions, progress: Progress | None
) -> TorchComponent:
    """Raises CapacityError before anything is read when the weights do not fit, CheckpointError when there are none."""
    quieten()
    if options.quantize not in (None, "none"):
        raise ConfigError(f"image models are not quantised ({options.quantize}); leave --quantize out")
    device = resolve_device(options)
    config = component_config(checkpoint, layer)
    dtype = component_dtype(layer, config, resolve_dtype(options, device))
    total = _size(checkpoint, info, layer, sd, dtype)
    check_memory(layer, total, device)
    if progress is not None:
        progress(0, total)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if isinstance(checkpoint, randoms.RandomCheckpoint):
        with device:
            module = randoms.build(checkpoint, layer).to(dtype)
    else:
        with _LOADING:
            module = _load_module(checkpoint, layer, dtype, sd)
    module.eval().requires_grad_(False)
    module = prepare(module.to(device), layer, sd)
    loras = _load_loras(checkpoint, layer, module, sd)
    if progress is not None:
        progress(total, total)
    about = About(layer, type(module).__name__, config_digest(config), NAMES[dtype], str(device), loras)
    return _wrap(about, module, info.architecture)


def component_dtype(layer: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """An autoencoder that overflows in f16 (`force_upcast`) is loaded in f32: upcast once, here, not at each picture."""
    if layer == "vae" and dtype == torch.float16 and config.get("force_upcast", False):
        return torch.float32
    return dtype


def _wrap(about: About, module: torch.nn.Module, pipeline: str) -> TorchComponent:
    kind = KINDS[about.layer]
    if kind == "text":
        return TextComponent(about, module)
    return VaeComponent(about, module) if kind == "vae" else DenoiserComponent(about, module, pipeline)


def _size(checkpoint: DiffusersCheckpoint, info: ModelInfo, layer: str, sd: SdOptions, dtype: torch.dtype) -> int:
    described = next((item for item in info.layers if item.name == layer), None)
    made_up = isinstance(checkpoint, randoms.RandomCheckpoint)
    if path := sd.weights.get(layer):
        header = read_headers(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        tensors: Mapping[str, TensorInfo] = component_tensors(header, FOLDERS[layer]) or header
    elif described is not None and (made_up or checkpoint.component_files(FOLDERS[layer])):
        tensors = checkpoint.component_headers(FOLDERS[layer])
    else:
        where = checkpoint.source.path if isinstance(checkpoint, SingleFileCheckpoint) else checkpoint.path / FOLDERS[layer]
        raise CheckpointError(
            f"{where} has no weights of {layer} on this machine; copy them here, name others with --sd-{layer}, or give the "
            f"layer {layer!r} to a node that has them"
        )
    element = torch.empty((), dtype=dtype).element_size()
    return sum(element * int(torch.Size(tensor.shape).numel()) for tensor in tensors.values())


def check_memory(layer: str, needed: int, device: torch.device) -> None:
    """Raises CapacityError, with the numbers, when `needed` bytes are not free on the device."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"{layer} needs {needed / 1e9:.2f} GB and {device} has {free / 1e9:.2f} GB free; use --dtype bf16, or "
            "give the layer to another node"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _load_module(checkpoint: DiffusersCheckpoint, layer: str, dtype: torch.dtype, sd: SdOptions) -> Any:
    real, folder = resolve_class(checkpoint, layer), FOLDERS[layer]
    if path := sd.weights.get(layer):
        if path.is_dir():
            return _from_folder(real, path, dtype, None)
        return _from_file(real, checkpoint.path, folder, path, dtype)
    if isinstance(checkpoint, SingleFileCheckpoint) and checkpoint.holds(folder):
        return load_tensors(real, checkpoint.component_headers(folder), checkpoint.path, folder, dtype_argument(real, dtype))
    files = checkpoint.component_files(folder)
    return _from_folder(real, files[0].parent, dtype, _variant(files[0].name))


def _variant(name: str) -> str | None:
    """`fp16` of `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`."""
    parts = name.split(".")
    return parts[1].split("-")[0] if len(parts) == 3 else None


def _from_folder(real: type[Any], folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    try:
        found = real.from_pretrained(
            str(folder), variant=variant, use_safetensors=True, local_files_only=True, **dtype_argument(real, dtype)
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded as {real.__name__}: {reason}; download it again") from error
    return found


def dtype_argument(real: type[Any], dtype: torch.dtype) -> dict[str, Any]:
    """diffusers and transformers renamed `torch_dtype` to `dtype`, and warn about the old name."""
    if real.__module__.startswith("transformers"):
        import transformers

        return {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": dtype}
    from diffusers.utils import deprecation_utils

    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}


def _from_file(real: type[Any], configs: Path, folder: str, file: Path, dtype: torch.dtype) -> Any:
    """Weights from a file given in place of the model's own: under diffusers' names or the trainers', alone or in a single
    file with others."""
    header = read_header(file)
    own = component_tensors(header, folder)
    if own or not hasattr(real, "config_class"):
        return load_tensors(real, own or header, configs, folder, dtype_argument(real, dtype))
    # A text encoder under transformers' names: a folder of links makes it look like the model's own.
    with tempfile.TemporaryDirectory(prefix="cake-sd-") as staged:
        (Path(staged) / "config.json").write_bytes((configs / folder / "config.json").read_bytes())
        os.symlink(file.absolute(), Path(staged) / "model.safetensors")
        return _from_folder(real, Path(staged), dtype, None)


def prepare(module: Any, layer: str, sd: SdOptions) -> Any:
    """What makes a module faster where it runs: channels_last and, when asked for, compilation on a GPU."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        if KINDS[layer] != "text":
            module = module.to(memory_format=torch.channels_last)
    if sd.attention_slice is not None and KINDS[layer] == "denoiser" and hasattr(module, "set_attention_slice"):
        module.set_attention_slice("auto" if sd.attention_slice == 0 else sd.attention_slice)
    if sd.compile and KINDS[layer] == "denoiser":
        module.compile(fullgraph=True)
    return module


def _load_loras(checkpoint: DiffusersCheckpoint, layer: str, module: Any, sd: SdOptions) -> tuple[str, ...]:
    if not sd.lora or KINDS[layer] == "vae":
        return ()
    from cake_sd.lora import load_loras

    return load_loras(checkpoint, layer, module, sd.lora)


def load_tokenizer(checkpoint: DiffusersCheckpoint, part: str, path: Path) -> Any:
    """A tokenizer given on the command line: a folder, or a tokenizer.json."""
    import transformers

    entry = component_class(checkpoint, part)
    real = getattr(transformers, entry[1], None) if entry else None
    if real is None:
        raise ConfigError(f"{checkpoint.path}: the model has no {part}; leave --sd-{part.replace('_', '-')} out")
    try:
        return real.from_pretrained(str(path)) if path.is_dir() else real(tokenizer_file=str(path), model_max_length=77)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no tokenizer for {real.__name__}; give a tokenizer.json or a folder with one") from error
