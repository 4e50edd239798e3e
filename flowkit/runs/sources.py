"""Sources that ``samples=`` and ``reference=`` name: files, folders, runs, data, statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.data.files import ARCHIVES, first_ten
from flowkit.data.image_files import ImageFiles, folder_of_images, tar_of_images
from flowkit.data.npz import Npz
from flowkit.data.pixels import Resize
from flowkit.data.sample_sets import Drawn, NpzImages, OfSplit, Resized, SampleSet, is_gray
from flowkit.hub import folder_of, results_of
from flowkit.metrics import Features, Statistics, from_uint8, outputs_of
from flowkit.metrics.extrapolation import fewest_samples
from flowkit.modules.checkpoints import read_config
from flowkit.places import no_such_place
from flowkit.provenance import read_json
from flowkit.rules import is_run as names_run
from flowkit.runs.splits import prepared, stored_data
from flowkit.runs.written import form_of, place_in

MOMENTS = ("mu", "sigma")
WIDEST = 8192  # features; a covariance of more takes 0.5 GB, and its root many minutes


@dataclass(frozen=True)
class Source:
    """Images or statistics, and what is known about them.

    Attributes:
        images: The images; None for a file of statistics.
        moments: A file with mean and covariance of the features; None for images alone.
        data: The data that the images are a split of, or None.
        made: What ``flowkit sample`` recorded about the images: ``weights`` and ``sampling``.
    """

    images: SampleSet | None
    moments: Npz | None = None
    data: SplitData | None = None
    made: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name in errors and records."""
        return (
            self.images.name if self.images is not None else str(self.moments and self.moments.file)
        )

    @property
    def stored(self) -> dict[str, Any]:
        """Storage of the images; ``quantization`` is None where the rule is not known."""
        if self.images is None:
            return {"kind": "statistics", "file_format": None, "quantization": None}
        found = dict(self.images.stored)
        made = (self.made or {}).get("samples", {}).get("quantization")
        return found if found["quantization"] or not made else {**found, "quantization": made}


@dataclass(frozen=True)
class Reading:
    """Settings with which sources are read; the options of ``flowkit evaluate``.

    Attributes:
        split: Split of data, train, val or test.
        class_folders: Whether sub-folders are classes.
        quantization: Rule from floats to bytes, see `flowkit.metrics.to_uint8`.
        resize: What is done to each image, or None.
        trust: Names of own classes that the configuration of a run may name.
        data_root: New place of a run's data.
        data_changed: ``"refuse"`` or ``"accept"`` data of a run that differ from its record.
    """

    split: str = "test"
    class_folders: bool = False
    quantization: str = "round"
    resize: Resize | None = None
    trust: tuple[str, ...] = ()
    data_root: str | None = None
    data_changed: str = "refuse"

    @classmethod
    def of(cls, cfg: DictConfig) -> "Reading":
        """Return the options of a recipe.

        Raises:
            ValueError: If a filter is given without a resize, or does not exist.
        """
        plain = (cfg.filter, cfg.antialias) == ("lanczos", True)
        if cfg.resize is None and not plain:
            raise ValueError(
                f"filter and antialias must be absent without resize=, got {cfg.filter} and "
                f"{str(cfg.antialias).lower()}"
            )
        return cls(
            cfg.split,
            cfg.get("class_folders", False),
            cfg.get("quantization", "round"),
            None if cfg.resize is None else Resize(cfg.resize, cfg.filter, cfg.antialias),
            tuple(cfg.trust),
            OmegaConf.select(cfg, "data.root") if "reference" in cfg and "run" in cfg else None,
            cfg.data_changed,
        )


def is_run(place: Any) -> bool:
    """Return True for a run folder or a shared model."""
    return isinstance(place, str) and names_run(place)


def open_source(place: Any, argument: str, reading: Reading) -> Source:
    """Open what an option names. Nothing is looked for on a hub.

    Args:
        place: A folder of images, an ``.npz``, ``.tar`` or ``.pt`` file, a folder of tar files, a
            run folder, the folder of ``flowkit sample``, or the configuration of data.
        argument: Name of the option: of ``samples`` a run gives the samples that were drawn from
            it, of another option its data.
        reading: How to read it.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        TypeError, ValueError: If it holds no images as described in the readers.
    """
    if OmegaConf.is_dict(place) or isinstance(place, Mapping):
        return _of_data(prepared(instantiate(place)), argument, reading)
    path = Path(str(place))
    if is_run(str(place)):
        if argument != "samples":
            return _of_data(data_of_run(str(place), reading), argument, reading)
        path = results_of(place) / "drawn"
        if not (path / "samples.json").is_file():
            raise FileNotFoundError(
                f"{argument} must hold drawn samples, got no {path / 'samples.json'}; draw them: "
                f"flowkit sample run={place}"
            )
    elif not path.exists():
        raise FileNotFoundError(no_such_place(argument, str(place), "data"))
    if (record := _record(path / "samples.json")) is not None:
        path = path / place_in(form_of(record))
        if not path.exists():
            raise FileNotFoundError(
                f"{argument} must hold the samples of its record, got no {path}"
            )
    return _made(_opened(path, argument, reading), path, argument, reading)


def data_of_run(place: str, reading: Reading) -> SplitData:
    """Return the data of a run with their splits, without loading its network."""
    folder = folder_of(place)
    node = read_config(folder)["data"]
    return stored_data(node, reading.trust, folder, reading.data_root, reading.data_changed)


def _of_data(data: SplitData, argument: str, reading: Reading) -> Source:
    """Return a split of data: as samples the training images, else the split that was chosen."""
    split = "train" if argument == "samples" else reading.split
    if len(data.shape) != 3 or data.shape[0] not in (1, 3):
        raise TypeError(
            f"{argument} must be images with 1 or 3 channels, got {type(data).__name__} of shape "
            f"{data.shape}"
        )
    name = f"{type(data).__name__}, {split} split"
    found = OfSplit(data.split(split), name, data.num_classes, data.class_names)
    return Source(_resized(found, reading), data=data)


def _opened(path: Path, argument: str, reading: Reading) -> Source:
    """Open a file or a folder."""
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if tars and not reading.class_folders:
            return Source(tar_of_images(tars, str(path), argument, reading.resize))
        return Source(folder_of_images(path, argument, reading.class_folders, reading.resize))
    if reading.class_folders:
        raise ValueError(f"class_folders must be false for a file, got true for {path}")
    if path.suffix == ".npz":
        return _of_npz(Npz.open(path), argument, reading)
    if path.suffix == ".tar":
        return Source(tar_of_images([path], str(path), argument, reading.resize))
    if path.suffix == ".pt":
        return Source(_resized(Drawn.open(path, argument, reading.quantization), reading))
    fix = "; unpack it, and give the folder" if path.suffix in ARCHIVES else ""
    raise ValueError(
        f"{argument} must be a folder of images, or a .npz, .tar or .pt file, got {path}{fix}"
    )


def _of_npz(npz: Npz, argument: str, reading: Reading) -> Source:
    """Return the images and the statistics of an npz file."""
    if "arr_0" in npz:
        moments = npz if all(name in npz for name in MOMENTS) else None
        return Source(_resized(NpzImages(npz, argument), reading), moments)
    if all(name in npz for name in MOMENTS):
        return Source(None, npz)
    raise ValueError(
        f"{argument} must hold images in arr_0, or statistics in mu and sigma, got "
        f"{', '.join(npz.names) or 'no arrays'} in {npz.file}"
    )


def _resized(images: SampleSet, reading: Reading) -> SampleSet:
    """Return images of arrays with the resize of the options."""
    return images if reading.resize is None else Resized(images, reading.resize)


def _made(source: Source, path: Path, argument: str, reading: Reading) -> Source:
    """Return a source with what ``flowkit sample`` recorded beside its file or folder."""
    record = _record(path.with_suffix(".json"))
    if record is None or Path(place_in(form_of(record))).suffix != path.suffix:
        return source
    own = {key: record[key] for key in ("weights", "sampling") if key in record}
    return replace(source, made={**own, "samples": record.get("samples") or {}})


def _record(file: Path) -> dict[str, Any] | None:
    """Return a record of ``flowkit sample``, or None."""
    if not file.is_file():
        return None
    found = read_json(file)
    drawn = isinstance(found, dict) and {"weights", "sampling"} <= found.keys()
    return found if drawn and isinstance(found.get("samples", {}), dict) else None


# --- checks before the work -------------------------------------------------------------------


def common_channels(
    samples: SampleSet,
    reference: Source,
    data: SplitData | None,
    features: Features,
    statistics: Statistics | None,
) -> int:
    """Return the number of channels in which samples and reference are compared.

    It is that of data, for which feature networks are trained; else see `channels_of`.

    Raises:
        ValueError: If the images differ in size.
    """
    real = reference.images
    if real is not None and samples.shape[1:] != real.shape[1:]:
        size, real_size = samples.shape[1:], real.shape[1:]
        raise ValueError(
            f"samples must have the size of the reference, {real_size[1]}x{real_size[0]}, got "
            f"{size[1]}x{size[0]}; resize={min(real_size)} resamples both"
        )
    if data is not None:
        return data.shape[0]
    return channels_of([samples] if real is None else [samples, real], features, statistics)


def channels_of(
    sets: Sequence[SampleSet], features: Features, statistics: Statistics | None = None
) -> int:
    """Return 1 if all images of some sets are gray, in whatever format, else 3.

    So gray images have the same distance in npz files and in WebP, which have three equal channels,
    as in PNG. Gray images take 3 channels if the network knows colors only, or if the statistics
    are of 3 channels.
    """
    size, known = sets[0].shape[1:], []
    for channels in (1, 3) if all(map(is_gray, sets)) else (3,):
        try:
            width = width_of(features, (channels, *size))
        except Exception:  # any network refuses channels in its own way; `check_features` shows it
            continue
        if statistics is None or width == len(statistics.mean):
            return channels
        known.append(channels)
    return known[0] if known else max(images.shape[0] for images in sets)


def width_of(features: Features, shape: Sequence[int]) -> int:
    """Return the number of features of images of a shape, by one image of zeros."""
    blank = torch.zeros(1, *shape, dtype=torch.uint8)
    return outputs_of(features, from_uint8(blank))["features"].shape[1]


def check_features(
    features: Features, shape: Sequence[int], count: int | None, statistics: Statistics | None
) -> None:
    """Require a feature network that fits images and statistics.

    Args:
        features: The network.
        shape: Shape of the images.
        count: Samples of which a distance is extrapolated, or None.
        statistics: Statistics of the reference, or None.

    Raises:
        ValueError: If the network does not take such images, there are too many features, or too
            few samples, or the statistics are of another network.
    """
    try:
        width = width_of(features, shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"metric must take images of shape {tuple(shape)}, got {features.name}: {error}; "
            "choose another metric, or another resize="
        ) from error
    if width > WIDEST:
        raise ValueError(
            f"metric must have at most {WIDEST:,} features for a Fréchet distance, got {width:,} "
            f"of {features.name}; choose a feature network, such as metric=inception, or resize="
        )
    if count is not None:
        check_at_least(
            count, fewest_samples(width), f"num_samples with extrapolate=true and {width} features"
        )
    if statistics is not None:
        statistics.check_features(features.name, features.hash, width)


def with_classes_of(data: SplitData, images: SampleSet) -> SampleSet:
    """Return images whose class folders have the numbers of the classes of data.

    Raises:
        ValueError: If a folder is neither the name nor the number of a class.
    """
    if not isinstance(images, ImageFiles) or images.classes is None or images.labels is None:
        return images
    count = data.num_classes or 0
    known = list(data.class_names or [])
    numbers = {str(number): number for number in range(count)}
    numbers |= {name: number for number, name in enumerate(known)}
    if others := [name for name in images.classes if name not in numbers]:
        raise ValueError(
            f"class_folders must be classes of the data, "
            f"{', '.join(known or numbers) or 'which have none'}, got {first_ten(others)}; their "
            "numbers are fine, too"
        )
    found = torch.tensor([numbers[name] for name in images.classes])
    state = f"{images.state} {found.tolist()}"
    return replace(images, labels=found[images.labels], classes=data.class_names, state=state)
