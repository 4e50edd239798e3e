"""Samples as files: the tensors of ``format=pt``, the npz of ADM, or a PNG file each."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.data.image_files import LABELS
from flowkit.data.pixels import picture_of, with_channels
from flowkit.metrics import to_uint8
from flowkit.provenance import write_atomically, write_json
from flowkit.types import Cond

FORMS = ("pt", "npz", "png")


def place_in(form: str) -> str:
    """Return the name of the file or folder of samples of a format.

    >>> [place_in(form) for form in FORMS]
    ['samples.pt', 'samples.npz', 'samples']
    """
    return "samples" if form == "png" else f"samples.{form}"


def form_of(record: dict[str, Any]) -> str:
    """Return the format in a record of ``flowkit sample``; earlier ones were all tensors."""
    form = record.get("samples", {}).get("format", "pt")
    return form if form in FORMS else "pt"


def form_record(form: str, quantization: str) -> dict[str, Any]:
    """Return what the record of ``flowkit sample`` says about the files."""
    return {"format": form, "quantization": None if form == "pt" else quantization}


def check_form(form: str, quantization: str, shape: Sequence[int] | None) -> None:
    """Require samples that the format can hold, before the work.

    Args:
        form: The format.
        quantization: Rule from floats to bytes.
        shape: Shape of a sample, or None if it is not known.

    Raises:
        ValueError: If samples are no images with 1 or 3 channels, or no bytes are written.
    """
    if form == "pt" and quantization != "round":
        raise ValueError(
            f"quantization must be round for format=pt, which holds floats, got {quantization}; "
            "give it to flowkit evaluate"
        )
    if form != "pt" and shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(
            f"format must be pt for samples that are no images with 1 or 3 channels, got {form} "
            f"for shape {tuple(shape)}"
        )


def check_place(folder: Path, form: str) -> None:
    """Require that a folder of PNG files may be written, before the work.

    Raises:
        ValueError: If there is such a folder that ``flowkit sample`` did not write.
    """
    place = folder / place_in(form)
    if form == "png" and place.exists() and not (folder / "samples.json").is_file():
        raise ValueError(
            f"out must hold no folder samples that flowkit sample did not write, got {place}; "
            "choose another out"
        )


def write_samples(place: Path, form: str, samples: Tensor, cond: Cond, quantization: str) -> None:
    """Write samples in a format.

    Args:
        place: The file, or of PNG files the folder.
        form: The format. ``npz`` has ``arr_0 (N, H, W, 3)`` of uint8 and, with classes, ``arr_1``,
            as ``numpy.load`` and ADM read them; gray samples have three equal channels. ``png``
            has files with the number of the sample as name, and ``dataset.json`` with classes.
        samples: Samples ``(N, *)``.
        cond: Conditions of the samples.
        quantization: Rule from floats to bytes, see `flowkit.metrics.to_uint8`.
    """
    if form == "pt":
        content = {"samples": samples, "cond": cond}
        write_atomically(place, lambda file: torch.save(content, file))
        return
    pixels = to_uint8(samples, quantization)
    known = isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()
    labels = cond.cpu() if known and isinstance(cond, Tensor) else None
    if form == "npz":
        _write_npz(place, pixels, labels)
    else:
        _write_files(place, pixels, labels)


def _write_npz(file: Path, pixels: Tensor, labels: Tensor | None) -> None:
    """Write the npz file of ADM."""
    last = with_channels(pixels, 3, "samples").permute(0, 2, 3, 1)
    arrays: dict[str, Any] = {"arr_0": last.numpy()}
    arrays |= {} if labels is None else {"arr_1": labels.numpy()}

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:  # with a name, numpy would append ".npz"
            np.savez(stream, **arrays)

    write_atomically(file, write)


def _write_files(folder: Path, pixels: Tensor, labels: Tensor | None) -> None:
    """Write a PNG file for each sample and their classes into a folder, which appears when whole.

    A folder of the same samples is replaced.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed call
    partial.mkdir(parents=True)
    try:
        names = [f"{number:06}.png" for number in range(len(pixels))]
        for name, one in zip(names, pixels, strict=True):
            picture_of(one).save(partial / name)
        if labels is not None:
            pairs = [list(pair) for pair in zip(names, labels.tolist(), strict=True)]
            write_json(partial / LABELS, {"labels": pairs})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
