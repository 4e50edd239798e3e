"""Symmetrical flow matching: one flow for images and their labels, run in both directions.

The image goes from noise to data while a code of its label goes from data to noise. One network
thus generates images of labels, and classifies or segments images. Use the package where both
tasks share a data set; `flowkit.modules.SymmetricalFlowMatching` trains the network. Codecs
translate between labels and codes.

Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634).
"""

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
