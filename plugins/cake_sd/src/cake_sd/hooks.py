"""Hooks of cake-sd: image models over diffusers."""

from collections.abc import Iterable

from cake_core import hookimpl
from cake_core.model import Backend


@hookimpl
def cake_register_backends() -> Iterable[Backend]:
    from cake_sd.backend import SdBackend

    return (SdBackend(),)
