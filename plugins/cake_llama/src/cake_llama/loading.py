"""Loading a stage: device and dtype chosen, memory checked before anything is read, weights, cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from cake_core.checkpoint import Checkpoint
from cake_core.errors import CapacityError, ConfigError
from cake_core.model import LoadOptions, ModelInfo, Progress
from cake_llama.cache import BLOCK, KvCache
from cake_llama.config import ModelConfig
from cake_llama.memory import available_bytes
from cake_llama.model import Loader, Parts
from cake_llama.names import EMBED, HEAD, NORM
from cake_llama.rotary import Rotary
from cake_llama.stage import LlamaStage
from cake_llama.weights import TORCH_DTYPES, weight_source

KV_SHARE = 0.5
"""Share of the memory left after the weights that the KV cache may take when nobody said how much."""
KV_CONTEXTS = 4
"""Full contexts of KV cache at most when nobody said how much."""


def load_stage(
    checkpoint: Checkpoint, info: ModelInfo, layers: Sequence[str], options: LoadOptions, progress: Progress | None
) -> LlamaStage:
    """Raises ConfigError for a device that is not there, CapacityError before loading what does not fit."""
    config = ModelConfig.from_checkpoint(checkpoint)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, config, device)
    total = _check_fit(info, layers, device, dtype)
    done = 0

    def moved(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(min(done, total), total)

    loader = Loader(config, weight_source(checkpoint, device), device, dtype, moved)
    with torch.inference_mode():
        parts = _parts(loader, layers)
    blocks = _blocks(info, layers, options, device)
    cache = KvCache(len(parts.blocks), (config.num_kv_heads, config.head_dim), blocks, device, dtype)
    rotary = Rotary(config.rope, device)
    if device.type == "cuda" and _has_triton():
        from cake_llama.cuda.graphs import capturable

        if capturable(config, parts):
            from cake_llama.cuda.stage import CudaStage

            return CudaStage(config, tuple(layers), parts, cache, rotary, dtype, done, info.context_length)
    return LlamaStage(config, tuple(layers), parts, cache, rotary, dtype, done)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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


def choose_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: the checkpoint's own where the device computes with it, else the nearest that it does."""
    if name != "auto":
        return TORCH_DTYPES[name]
    own = TORCH_DTYPES[config.dtype]
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if own is torch.bfloat16 and not bf16 else own
    if device.type == "cpu":
        return own if own is torch.bfloat16 and _cpu_has_bf16() else torch.float32
    return torch.float16 if device.type == "mps" and own is torch.bfloat16 else own


def _cpu_has_bf16() -> bool:
    capabilities: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)
    found = capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16") or found.get("bf16"))


def _check_fit(info: ModelInfo, layers: Sequence[str], device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of the layers. Raises CapacityError with how many of them would fit."""
    item = {"f32": 4, "f16": 2, "bf16": 2}[info.dtype]
    sizes = [info.layer(name).nbytes * dtype.itemsize // item for name in layers]
    if EMBED in layers and HEAD in layers and info.layer(EMBED).tensors == info.layer(HEAD).tensors:
        sizes[-1] = 0  # tied: one tensor serves both
    available = available_bytes(device)
    if sum(sizes) > available:
        fitting, used = 0, 0
        for size in sizes:
            used += size
            fitting += used <= available
        raise CapacityError(
            f"{len(layers)} layers need {sum(sizes) / 1e9:.2f} GB, {device} has {available / 1e9:.2f} GB left; "
            f"{fitting} of them would fit: give this node fewer layers, or use a smaller --dtype"
        )
    return sum(sizes)


def _parts(loader: Loader, layers: Sequence[str]) -> Parts:
    embedding = loader.tensor(f"{EMBED}.weight") if EMBED in layers else None
    indices = [int(name.rsplit(".", 1)[1]) for name in layers if name.startswith("model.layers.")]
    blocks = [loader.block(index, place) for place, index in enumerate(indices)]
    norm = loader.norm(NORM) if NORM in layers else None
    return Parts(embedding, blocks, norm, loader.head(embedding) if HEAD in layers else None)


def _blocks(info: ModelInfo, layers: Sequence[str], options: LoadOptions, device: torch.device) -> int:
    """Blocks of the KV cache: as asked, else what the context needs a few times over, within the memory left."""
    if options.kv_tokens is not None:
        return max(1, options.kv_tokens // BLOCK)
    per_token = sum(info.layer(name).kv_bytes_per_token for name in layers)
    wanted = KV_CONTEXTS * info.context_length
    if per_token:
        wanted = min(wanted, int(available_bytes(device) * KV_SHARE) // per_token)
    return max(1, wanted // BLOCK)
