"""Previews: what the latents look like, by a linear map from latents to colours that is fitted on the model's own pictures."""

from __future__ import annotations

import threading
from typing import Any

import torch

_CROP = 24  # latents a side that are decoded once when a preview is wanted before any picture is finished


def to_latents(pipeline: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Latents of a step as [N, C, h, w]: some pipelines keep them as patches in a row."""
    if latents.ndim == 3 and hasattr(pipeline, "_unpack_latents"):
        unpacked: torch.Tensor = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        return unpacked
    return latents


def to_decoder(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """[N, C, h, w] as the autoencoder wants them: pipelines scale and shift latents, or bring them to mean and deviation."""
    config = pipeline.vae.config
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean and deviation and len(mean) == latents.shape[1]:
        shape = (1, len(mean), 1, 1)
        spread = torch.tensor(deviation, device=latents.device, dtype=latents.dtype).view(shape)
        centre = torch.tensor(mean, device=latents.device, dtype=latents.dtype).view(shape)
        return latents * (spread / float(config.scaling_factor)) + centre
    return latents / float(config.scaling_factor) + float(getattr(config, "shift_factor", None) or 0.0)


def crop(latents: torch.Tensor) -> torch.Tensor:
    """The middle of the first latents, small enough to be decoded in passing."""
    height, width = latents.shape[-2:]
    top, left = max(0, (height - _CROP) // 2), max(0, (width - _CROP) // 2)
    return latents[:1, :, top : top + _CROP, left : left + _CROP]


class LinearPreview:
    """Colours as a linear map of latents, by least squares over the pictures seen so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._normal: torch.Tensor | None = None
        self._target: torch.Tensor | None = None
        self._map: torch.Tensor | None = None

    @property
    def learnt(self) -> bool:
        """Whether a finished picture has been seen."""
        return self._normal is not None

    def learn(self, latents: torch.Tensor, pixels: torch.Tensor, finished: bool = True) -> None:
        """From latents [N, C, h, w] and the picture they decoded to, uint8 [N, H, W, 3].

        One that is not `finished` serves for now only: early steps exaggerate.
        """
        size = (latents.shape[-2], latents.shape[-1])
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float().cpu(), size)
        inputs, targets = _flat(latents), _flat(pooled, ones=False)
        with self._lock:
            normal, target = inputs.T @ inputs, inputs.T @ targets
            if finished:
                normal = self._normal = normal if self._normal is None else self._normal + normal
                target = self._target = target if self._target is None else self._target + target
            ridge = 1e-3 * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
            self._map = torch.linalg.solve(normal + ridge, target)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 [N, h, w, 3], one pixel a latent."""
        if self._map is None:
            raise ValueError("a preview was asked for before one was learnt")
        count, _, height, width = latents.shape
        colours = (_flat(latents) @ self._map).clamp(0, 255).round().to(torch.uint8)
        return colours.reshape(count, height, width, 3)


def _flat(values: torch.Tensor, ones: bool = True) -> torch.Tensor:
    """[N, C, h, w] -> [N*h*w, C (+ 1)] in f64."""
    rows = values.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, values.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1) if ones else rows
