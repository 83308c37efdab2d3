"""Convert Pillow's images of any mode to grey or colour of 8 bits a channel; refuse images of more bits."""

from __future__ import annotations

from typing import Any

_GREY = ("1", "L")  # modes of one channel


def eight_bits(image: Any, channels: int | None = None) -> Any:
    """Return a picture of Pillow as grey ("L") or colour ("RGB").

    Palettes become their colours, CMYK and YCbCr are converted, and black and white become 0 and 255. Transparency is
    dropped if `channels` is given, and kept (modes LA and RGBA) if not.

    Args:
        image: The picture.
        channels: 3 for colour, 1 for grey; None means as the picture itself.

    Raises:
        ValueError: If the picture has more than 8 bits a channel (Pillow would keep the highest 8, and turn dark
            pictures of 10 or 12 bits black), or its mode cannot be converted.

    Example:
        >>> from PIL import Image
        >>> eight_bits(Image.new("RGB", (2, 2), "red").quantize(2)).getpixel((0, 0))
        (255, 0, 0)
    """
    if image.mode.startswith(("I", "F")) or bits_of(image) > 8:
        raise ValueError("more than 8 bits a channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA").convert("RGB")  # without a warning
    if channels is not None:
        return image.convert("RGB" if channels == 3 else "L")
    if image.mode in ("LA", "RGBA"):
        return image
    return image.convert("L" if image.mode in _GREY else "RGB")


def bits_of(image: Any) -> int:
    """Return the bits of a channel in the file of an opened picture, before it is loaded; 8 if the file does not say.

    Pillow opens colour of 16 bits in a mode of 8 bits, so the mode does not tell. The file's header and the way in
    which Pillow is about to read it (`tile`, which loading removes) do.

    Example:
        >>> from PIL import Image
        >>> bits_of(Image.new("RGB", (1, 1)))
        8
    """
    found = [8]
    if image.format == "TIFF":
        found += image.tag_v2.get(258, ())  # BitsPerSample
    if image.format == "JPEG2000" and image.fp is not None:
        found.append(_bits_of_jpeg2000(image))
    for tile in getattr(image, "tile", ()):
        given = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        found += [16 for part in given if isinstance(part, str) and ";16" in part]
        if image.format == "PPM":  # the largest value, beside the mode
            found += [part.bit_length() for part in given if isinstance(part, int)]
    return int(max(found))


def _bits_of_jpeg2000(image: Any) -> int:
    position = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(2**16)
    image.fp.seek(position)
    start = head.find(b"\xff\x4f\xff\x51")  # the markers SOC and SIZ; the first channel's depth is 42 bytes later
    return (head[start + 42] & 127) + 1 if 0 <= start < len(head) - 42 else 8
