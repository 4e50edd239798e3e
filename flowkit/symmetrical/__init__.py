"""Symmetrical flow matching: codecs of labels, and flows of images and labels at once."""

from flowkit.symmetrical.codecs import Codec, OneHot, OneHotMask, Ordinal, RGBPalette, Simplex
from flowkit.symmetrical.joint import JointFlow
from flowkit.symmetrical.label_states import (
    Classification,
    LabeledImages,
    LabelStates,
    Segmentation,
)
from flowkit.symmetrical.networks import CodesAsNumbers, NoisePath, TwoTimes

__all__ = [
    "Classification",
    "Codec",
    "CodesAsNumbers",
    "JointFlow",
    "LabelStates",
    "LabeledImages",
    "NoisePath",
    "OneHot",
    "OneHotMask",
    "Ordinal",
    "RGBPalette",
    "Segmentation",
    "Simplex",
    "TwoTimes",
]
