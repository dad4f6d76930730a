"""Loading a stage: device and dtype chosen, memory checked before anything is read, weights, cache."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CapacityError, CheckpointError, ConfigError
from cake_core.model import LoadOptions, ModelInfo, Progress
from cake_core.spreading import KV_SHARE
from cake_llama.cache import BLOCK, KvCache
from cake_llama.config import ModelConfig
from cake_llama.cpu.loader import Treatment, cpu_loader
from cake_llama.grammar import Grammars
from cake_llama.memory import available_bytes, current
from cake_llama.model import Dtypes, Loader, Parts
from cake_llama.names import EMBED, HEAD, NORM, layer_weights
from cake_llama.narrow import NarrowedWeights
from cake_llama.narrow_loader import NarrowLoader
from cake_llama.packed import PLAIN
from cake_llama.rotary import Rotary
from cake_llama.stage import LlamaStage, StageSpec
from cake_llama.weights import TORCH_DTYPES, WeightSource, weight_source

KV_DTYPES = {**TORCH_DTYPES, "int8": torch.int8}

KV_CONTEXTS = 4
"""Full contexts of KV cache at most when nobody said how much."""


def load_stage(
    checkpoint: Checkpoint, info: ModelInfo, layers: Sequence[str], options: LoadOptions, progress: Progress | None
) -> LlamaStage:
    """Raises ConfigError for a device that is not there, CapacityError before loading what does not fit."""
    config = ModelConfig.from_checkpoint(checkpoint)
    _check_present(checkpoint, info, layers)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    done = 0

    def moved(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(min(done, total), total)

    source = weight_source(checkpoint, device)
    if options.quantize is not None and options.quantize != "none":
        source = NarrowedWeights(source, options.quantize, device)
    how = _treatment(options)
    narrow = keeps_width(device, source, how)
    own = cpu_loader(config, source, how, moved) if device.type == "cpu" and not narrow else None
    dtypes = choose_dtypes(info.dtype, device, exactly=options.dtype != "auto")
    if own is not None:
        dtypes = Dtypes(dtypes.stored, torch.float32)
    total = _check_fit(_sizes(config, info, layers, None if own or narrow else dtypes.stored), device)
    if narrow:
        loader: Loader = NarrowLoader(config, source, device, dtypes, device.type == "cuda" and _has_triton(), moved)
    else:
        loader = own or Loader(config, source, device, dtypes, moved)
    with torch.inference_mode(), current(device):
        parts = _parts(loader, layers, dtypes.computed)
    kv_dtype = dtypes.stored if options.kv_dtype == "auto" else KV_DTYPES[options.kv_dtype]
    cache = KvCache(
        len(parts.blocks), (config.num_kv_heads, config.head_dim), _blocks(info, layers, options, device), device, kv_dtype
    )
    if own is not None:
        parts = own.finish(parts, cache)
    spec = StageSpec(config, tuple(layers), dtypes, info.context_length, done, Grammars(checkpoint, config.vocab_size))
    rotary = Rotary(config.rope, device)
    if device.type == "cuda" and kv_dtype is dtypes.computed and dtypes.stored is dtypes.computed and _has_triton():
        from cake_llama.cuda.graphs import capturable

        if capturable(config, parts):
            from cake_llama.cuda.stage import CudaStage

            return CudaStage(spec, parts, cache, rotary)
    return LlamaStage(spec, parts, cache, rotary)


def _treatment(options: LoadOptions) -> Treatment:
    as_is = options.dtype == "auto" or options.quantize not in (None, "none")
    return Treatment(None if as_is else TORCH_DTYPES[options.dtype], options.threads or torch.get_num_threads())


def keeps_width(device: torch.device, source: WeightSource, how: Treatment) -> bool:
    """Whether weights are kept in the narrow form, which is how devices other than the CPU hold what has less than 16 bit."""
    if device.type == "cpu" or how.dtype is not None:
        return False
    return any(source.kind(name) not in PLAIN.values() for name in source.names() if len(source.shape(name)) == 2)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_present(checkpoint: Checkpoint, info: ModelInfo, layers: Sequence[str]) -> None:
    """A bundle knows all layers and holds some."""
    for layer in layers:
        missing = [name for name in info.layer(layer).tensors if name not in checkpoint.tensors]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path} does not hold {layer} (no {missing[0]}); it was split for other layers: "
                "give this node its own bundle or the whole model"
            )


def choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1, mps or xpu") from None
        if not _usable(device):
            raise ConfigError(f"device {name!r} is not usable here; `cake doctor` says why and how to mend it")
        return _indexed(device)
    found = (torch.device(kind) for kind in ("cuda", "mps", "xpu"))
    return _indexed(next((device for device in found if _usable(device)), torch.device("cpu")))


def _indexed(device: torch.device) -> torch.device:
    """The device by its number, which threads of ours need to make it theirs."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _usable(device: torch.device) -> bool:
    match device.type:
        case "cpu":
            return True
        case "cuda":
            return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        case "mps":
            return torch.backends.mps.is_available()
        case "xpu":
            return torch.xpu.is_available()
        case _:
            return False


def choose_dtypes(name: str, device: torch.device, exactly: bool = True) -> Dtypes:
    """Weights are kept as `name` says (unless `exactly`, as the other half-width type where only that one is computed with),
    and computed in f32 where the device lacks the arithmetic."""
    stored = TORCH_DTYPES[name]
    if computes(device, stored):
        return Dtypes(stored, stored)
    if not exactly and stored is torch.bfloat16 and device.type != "cpu" and computes(device, torch.float16):
        return Dtypes(torch.float16, torch.float16)
    return Dtypes(stored, torch.float32)


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has fast arithmetic of a type."""
    if dtype is torch.float32:
        return True
    if device.type == "cpu":
        return _cpu_has("bf16" if dtype is torch.bfloat16 else "fp16")
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8 if dtype is torch.bfloat16 else major >= 7 or (major, minor) in ((5, 3), (6, 0), (6, 2))
    return device.type != "mps" or dtype is torch.float16


def _cpu_has(dtype: str) -> bool:
    capabilities: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)
    found = capabilities()
    return any(found.get(name) for name in (f"avx512_{dtype}", f"amx_{dtype}", f"arm_{dtype}", dtype))


def _sizes(config: ModelConfig, info: ModelInfo, layers: Sequence[str], stored: torch.dtype | None) -> list[int]:
    """Bytes of each layer, all weights in one dtype or (None) as they were described."""
    sizes = [info.layer(name).nbytes for name in layers]
    if stored is not None:
        sizes = [sum(map(math.prod, layer_weights(config, layer).values())) * stored.itemsize for layer in layers]
    if EMBED in layers and HEAD in layers and info.layer(EMBED).tensors == info.layer(HEAD).tensors:
        sizes[-1] = 0  # tied: one tensor serves both
    return sizes


def _check_fit(sizes: Sequence[int], device: torch.device) -> int:
    """Bytes of the layers. Raises CapacityError with how many of them would fit."""
    available = available_bytes(device)
    if sum(sizes) > available:
        fitting = sum(used <= available for used in accumulate(sizes))
        raise CapacityError(
            f"{len(sizes)} layers need {sum(sizes) / 1e9:.2f} GB, {device} has {available / 1e9:.2f} GB left; "
            f"{fitting} of them would fit: give this node fewer layers, or use a smaller --dtype"
        )
    return sum(sizes)


def _parts(loader: Loader, layers: Sequence[str], dtype: torch.dtype) -> Parts:
    embedding = loader.embedding() if EMBED in layers else None
    indices = [int(name.rsplit(".", 1)[1]) for name in layers if name.startswith("model.layers.")]
    blocks = [loader.block(index, place) for place, index in enumerate(indices)]
    norm = loader.norm(NORM) if NORM in layers else None
    return Parts(embedding, blocks, norm, loader.head(embedding) if HEAD in layers else None, dtype)


def _blocks(info: ModelInfo, layers: Sequence[str], options: LoadOptions, device: torch.device) -> int:
    """Blocks of the KV cache: as asked, else what the context needs a few times over, within the memory left."""
    if options.kv_tokens is not None:
        return max(1, options.kv_tokens // BLOCK)
    per_token = sum(info.layer(name).kv_bytes_per_token for name in layers)
    wanted = KV_CONTEXTS * info.context_length
    if per_token:
        wanted = min(wanted, int(available_bytes(device) * KV_SHARE) // per_token)
    return max(1, wanted // BLOCK)
