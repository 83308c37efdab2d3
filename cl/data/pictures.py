"""Pictures of Pillow's many modes as grey or colour of 8 bits a channel, or not at all."""

from __future__ import annotations

from typing import Any

_GREY = ("1", "L")  # modes that one channel holds


def eight_bits(image: Any, channels: int | None = None) -> Any:
    """Return a picture of Pillow as grey ("L") or colour ("RGB").

    Palettes become their colours, CMYK and YCbCr are converted, and black and white is 0 and 255. Transparency is
    left out where a number of channels is asked for, and kept (modes LA and RGBA) where it is not.

    Args:
        image: The picture.
        channels: 3 for colour, 1 for grey; None means what the picture itself is.

    Raises:
        ValueError: If it has more than 8 bits a channel, of which Pillow would keep the highest and show dark
            pictures of 10 or 12 bits as black; or a mode that has no such colours.

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
    """Return the bits of a channel that the file of an opened picture holds; 8 where it does not say.

    Pillow opens colour of 16 bits in modes of 8, so this looks at how it would read the file: only before the picture
    is loaded.

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
    place = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(2**16)
    image.fp.seek(place)
    start = head.find(b"\xff\x4f\xff\x51")  # where the code stream begins; depths follow 38 bytes later
    return (head[start + 42] & 127) + 1 if 0 <= start < len(head) - 42 else 8
