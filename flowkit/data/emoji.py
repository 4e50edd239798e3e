"""Emoji in color, read from a font."""

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_between, check_choice
from flowkit.couplings import Coupling
from flowkit.data.arrays import Arrays
from flowkit.data.emoji_groups import group_of, groups, plain
from flowkit.data.splits import SplitData, partition

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

DEBIAN_EMOJI = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
KINDS = ("groups", "subgroups")
FEW = 3  # a class of fewer emoji stays in training


class Emoji(SplitData):
    """Color emoji on white: ``x1 (B, 3, S, S)`` in [-1, 1], ``cond (B,)`` their Unicode class.

    The font *Noto Color Emoji* (SIL Open Font License) holds about 3 900 pictures of 136 x 128
    pixels. They are laid on white, made square and reduced. Glyphs that are no emoji
    are left out, and so are copies of a picture. The tones of skin of one emoji stay in one split:
    a test image has no near copy in training.

    Args:
        font: Font file with color bitmaps (table ``CBDT``); None means that of Debian's package
            ``fonts-noto-color-emoji``.
        image_size: Side of the images in pixels, from 8 to 128.
        classes: ``"subgroups"`` of Unicode, such as ``heart`` or ``animal-bird`` (about 100), or
            the 9 ``"groups"``.
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split, stratified by class.
        test_fraction: The share of the test split, stratified by class.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        ValueError: If ``image_size`` or ``classes`` is out of range; on ``setup``, if the font is
            damaged or has no color bitmaps.
        FileNotFoundError: On ``setup``, if there is no such font.
    """

    def __init__(
        self,
        font: str | Path | None = None,
        image_size: int = 32,
        classes: str = "subgroups",
        batch_size: int = 128,
        flip: bool = False,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip, coupling=coupling
        )
        check_between(image_size, 8, 128, "image_size")
        check_choice(classes, KINDS, "classes")
        self.font = DEBIAN_EMOJI if font is None else Path(font)
        self.image_size, self.classes = image_size, classes
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed

    def load(self) -> Mapping[str, Arrays]:
        """Read the font, and divide its emoji into splits."""
        found, seen = [], set()
        for sequence, content in bitmaps(self.font):
            group = group_of(sequence)
            if group is not None and content not in seen:
                seen.add(content)
                found.append((sequence, group, content))
        if not found:
            raise ValueError(f"font must hold emoji, got none in {self.font}")
        names = [groups()[group] if self.classes == "groups" else group for _, group, _ in found]
        order = dict.fromkeys(groups().values() if self.classes == "groups" else groups())
        self.class_names = [name for name in order if name in set(names)]
        self.num_classes = len(self.class_names)
        labels = torch.tensor([self.class_names.index(name) for name in names])
        images = torch.stack([self._image(content) for _, _, content in found])
        # An emoji in all its tones of skin is one thing to put into a split.
        plains: dict[tuple[int, ...], int] = {}
        kind = torch.tensor([plains.setdefault(plain(seq), len(plains)) for seq, _, _ in found])
        label = torch.stack([labels[kind == k][0] for k in range(len(plains))])
        large = label.bincount()[label] >= FEW
        train, val, test = partition(
            int(large.sum()), self.fractions, self.split_seed, label[large]
        )
        shared, alone = large.nonzero()[:, 0], (~large).nonzero()[:, 0]
        kinds = {
            "train": torch.cat([shared[train], alone]),
            "val": shared[val],
            "test": shared[test],
        }
        rows = {name: torch.isin(kind, part).nonzero()[:, 0] for name, part in kinds.items()}
        return {
            name: Arrays({"x1": images[at], "cond": labels[at]}, str(self.font))
            for name, at in rows.items()
        }

    def _image(self, content: bytes) -> Tensor:
        """Return the picture of a glyph on white, ``(3, S, S)`` of uint8."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                drawn = image.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"font must hold PNG images, got {error} in {self.font}") from error
        side, size = max(drawn.size), (self.image_size, self.image_size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        small = square.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def bitmaps(font: Path) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """Yield the code points and the PNG file of each glyph of a font with color bitmaps.

    Raises:
        FileNotFoundError: If there is no such font.
        ValueError: If the font is damaged or has no color bitmaps.
    """
    from fontTools.ttLib import TTFont, TTLibError

    if not font.is_file():
        raise FileNotFoundError(
            f"font must be a font file, got {font}; install the emoji by apt-get install "
            "fonts-noto-color-emoji, or give the file of another font as font"
        )
    try:
        with font.open("rb") as file, TTFont(file, lazy=True) as opened:
            if "CBDT" not in opened:
                raise ValueError(f"font must have color bitmaps (table CBDT), got none in {font}")
            sequences = _sequences(opened)
            for name, glyph in max(opened["CBDT"].strikeData, key=len).items():
                if (sequence := sequences(name)) is not None and hasattr(glyph, "imageData"):
                    yield sequence, glyph.imageData
    except (TTLibError, AssertionError, KeyError, IndexError, OSError, struct.error) as error:
        raise ValueError(f"font must be a font file, got {error!r} for {font}") from error


Sequence = tuple[int, ...] | None


def _sequences(font: "TTFont") -> Callable[[str], Sequence]:
    """Return the function from the name of a glyph to its code points, or None."""
    characters = {glyph: (point,) for point, glyph in (font.getBestCmap() or {}).items()}
    parts: dict[str, list[str]] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup if "GSUB" in font else ():
        for table in lookup.SubTable:
            inner = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(inner, "ligatures", {}).items():
                for found in ligatures:  # the first is in order, others serve right-to-left text
                    parts.setdefault(found.LigGlyph, [first, *found.Component])

    def sequence(name: str, depth: int = 0) -> Sequence:
        if name not in parts or depth > 3:  # ligatures of a damaged font could go round for ever
            return characters.get(name)
        found = [sequence(part, depth + 1) for part in parts[name]]
        return None if None in found else sum(cast(list[tuple[int, ...]], found), ())

    return sequence
