"""Data sets as Lightning data modules.

Each class reads one kind of source (tensors and arrays, image files, tar files, IDX files, the
Hugging Face hub, emoji of a font, mixtures of sounds, speech, latents, pairs, toy points,
demonstrations of robots) and divides its samples into the splits train, val and test. All batches
are of the type ``flowkit.types.Batch``. The training stream is endless, and a resumed run reads the
same batches as a run without interruption. A new data set is a subclass of `SplitData` with a
method ``load``.
"""

from flowkit.data.arrays import Arrays
from flowkit.data.cache import write_cache
from flowkit.data.captioned_audio import CaptionedAudio
from flowkit.data.demonstrations import Chunks, Demonstrations
from flowkit.data.digits import Digits
from flowkit.data.edm_latents import EDMLatents
from flowkit.data.emoji import Emoji
from flowkit.data.folder import Folder
from flowkit.data.from_arrays import FromArrays
from flowkit.data.hub import Hub
from flowkit.data.idx import IDX
from flowkit.data.instruments import Instruments
from flowkit.data.latents import Latents
from flowkit.data.mask_folder import MaskFolder
from flowkit.data.masks import Masks
from flowkit.data.mixtures import Mixtures
from flowkit.data.pairs import Pairs
from flowkit.data.shards import Shards
from flowkit.data.speech import Speech
from flowkit.data.speech_folder import SpeechFolder
from flowkit.data.splits import SplitData
from flowkit.data.toy import Toy, sample_toy
from flowkit.data.voices import SyntheticVoices

__all__ = [
    "IDX",
    "Arrays",
    "CaptionedAudio",
    "Chunks",
    "Demonstrations",
    "Digits",
    "EDMLatents",
    "Emoji",
    "Folder",
    "FromArrays",
    "Hub",
    "Instruments",
    "Latents",
    "MaskFolder",
    "Masks",
    "Mixtures",
    "Pairs",
    "Shards",
    "Speech",
    "SpeechFolder",
    "SplitData",
    "SyntheticVoices",
    "Toy",
    "sample_toy",
    "write_cache",
]
