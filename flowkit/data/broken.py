"""Image and audio files that cannot be read: found before training, and named in one error."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flowkit.audio.files import head_of
from flowkit.data.arrays import Split
from flowkit.data.files import first_ten

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow may read, whatever the name of a file says: for PostScript it would start a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
PROBED = 32  # images of a split that are decoded before training


class BrokenFiles(ValueError):
    """Error that names the first ten broken files.

    Args:
        broken: Name and error of each broken file.
        rule: What the files must be.
    """

    def __init__(self, broken: Sequence[str], rule: str = "image files must be readable") -> None:
        super().__init__(
            f"{rule}, got {len(broken)} broken: {first_ten(broken)}; remove or replace them"
        )
        self.broken, self.rule = broken, rule


def unreadable() -> tuple[type[Exception], ...]:
    """Return the errors that Pillow raises for files that it cannot read."""
    from PIL import Image

    return OSError, SyntaxError, ValueError, Image.DecompressionBombError


def why(error: Exception) -> str:
    """Return why Pillow cannot read a file, and what to do if the image is too large."""
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"more than {most} megapixels; store it with fewer pixels"
    return str(error)


def check_mode(image: "Image") -> None:
    """Require at most 8 bits per channel.

    Raises:
        ValueError: If the image has more. Pillow would clip its values.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image must have 8 bits per channel, got mode {image.mode}")


def verify(files: Iterable[Path], masks: bool = False) -> None:
    """Check the headers of image files.

    Args:
        files: The files.
        masks: Allow more than 8 bits per channel, as in masks.

    Raises:
        BrokenFiles: If a file is not a readable image.
    """
    from PIL import Image

    broken = []
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if not masks:
                    check_mode(image)
                image.verify()
        except unreadable() as error:
            broken.append(f"{file} ({why(error)})")
    if broken:
        raise BrokenFiles(broken)


def verify_audio(files: Iterable[Path]) -> list[float]:
    """Check the heads of audio files; return the lengths of the recordings in seconds.

    Args:
        files: The files.

    Raises:
        BrokenFiles: If a file is not a readable recording.
    """
    heads = [(file, head_of(file)) for file in files]
    if broken := [f"{file} ({head.fault})" for file, head in heads if head.fault]:
        raise BrokenFiles(broken, "audio files must be readable")
    return [head.seconds for _, head in heads]


def probe(splits: Mapping[str, Split], whole: bool) -> None:
    """Decode samples, so that broken files are found before training.

    Args:
        splits: The splits by name.
        whole: Decode all samples; otherwise `PROBED` samples of each split, evenly spaced.

    Raises:
        BrokenFiles: If a file cannot be decoded.
    """
    found: list[BrokenFiles] = []
    for split in splits.values():
        rows = torch.arange(len(split))
        if not whole and len(rows) > PROBED:
            rows = torch.linspace(0, len(split) - 1, PROBED).long()
        for some in rows.split(PROBED):
            try:
                split[some]
            except BrokenFiles as error:
                found.append(error)
    if found:
        raise BrokenFiles([name for error in found for name in error.broken], found[0].rule)
