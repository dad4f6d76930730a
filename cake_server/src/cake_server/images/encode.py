"""Finished images as files."""

from __future__ import annotations

import base64
import io

from cake_core import png
from cake_core.events import ImageDone
from cake_server.errors import unsupported


def check_format(name: str) -> None:
    """Raises a 400 before anything is painted when the format needs a library that is not there."""
    if name == "png":
        return
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        message = f"output_format {name} needs pillow on the server (`pip install cake-server[images]`); png always works"
        raise unsupported("output_format", message) from error


def encode(done: ImageDone, name: str, compression: int | None) -> bytes:
    """The image as PNG, JPEG or WebP. `compression`: quality of the lossy ones, 0 to 100."""
    if name == "png":
        return png.encode(done.rgb, done.width, done.height, {"Software": "Cake", "Seed": str(done.seed)})
    from PIL import Image

    file = io.BytesIO()
    image = Image.frombytes("RGB", (done.width, done.height), done.rgb)
    image.save(file, name.upper(), quality=90 if compression is None else compression)
    return file.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
