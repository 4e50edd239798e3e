"""Edit an image to another class or prompt, or invert the image (FlowOpt).

flowkit edit run=runs/quickstart image=three.png source=3 target=8
flowkit edit run=runs/quickstart image=three.png source=3           inversion
flowkit edit pipeline=stable-diffusion-3 image=cat.png source="a cat" target="a dog"

No training is needed. The first iterate follows the target freely. Each further iterate comes
nearer to the image. Choose an iterate in the picture ``strip.png``. A pipeline is a folder that
``save_pretrained`` wrote.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.checks import check_between
from flowkit.data.folder import FORMATS, square
from flowkit.flowopt import Edit, FlowOpt
from flowkit.hub import results_of
from flowkit.metrics import from_uint8, to_uint8
from flowkit.metrics.gaussianity import gaussianity
from flowkit.metrics.pictures import save_figure, save_image, save_picture
from flowkit.places import check_writable
from flowkit.provenance import versions, write_atomically
from flowkit.runs.editing import PipelineFlow, RunFlow, Settings
from flowkit.runs.records import recording
from flowkit.sampling import ODESampler

SHOWN = 100  # iterates in the strip, at most


def edit(cfg: DictConfig) -> Edit:
    """Edit as configured; write pictures, the latent, the iterates and a record."""
    if (cfg.run is None) == (cfg.pipeline is None):
        raise ValueError(
            f"run or pipeline must be given, but not both, got {cfg.run} and {cfg.pipeline}"
        )
    check_writable(folder_of(cfg), "out")
    model = RunFlow.load(cfg) if cfg.pipeline is None else PipelineFlow.load(cfg)
    chosen = {k: cfg[k] for k in Settings._fields if cfg[k] is not None}
    settings = model.defaults(inverting=cfg.target is None)._replace(**chosen)
    image = read_image(cfg.image, model.channels, model.side).to(cfg.device)
    x1 = model.encode(image)
    region = None if cfg.region is None else read_region(cfg, model.side, x1)
    source = model.condition(cfg.source, settings.source_guidance, "source")
    target = None
    if cfg.target is not None:
        target = model.condition(cfg.target, settings.target_guidance, "target")
    check_between(settings.skip, 0, settings.num_steps - 1, "skip")
    sampler = ODESampler(model.grid(settings.num_steps, x1)[settings.skip :])
    flowopt = FlowOpt(
        sampler,
        settings.step_size,  # type: ignore[arg-type]  # FlowOpt checks the value
        settings.num_iters,
        settings.backtrack,
        anderson=cfg.anderson,
        tolerance=cfg.tolerance,
        distance=cfg.distance,
        patience=cfg.patience,
    )
    began = time.perf_counter()
    found = flowopt(model, x1, source, target, mask=region)
    seconds = round(time.perf_counter() - began, 3)
    record = {
        "image": str(cfg.image),
        "source": cfg.source,
        "target": cfg.target,
        "region": cfg.region,
        **describe(flowopt, settings, found),
        "seconds": seconds,
        "model": model.record(),
        "versions": versions(),
    }
    write(cfg, model, image, found, record)
    return found


# --- files ------------------------------------------------------------------------------------


def open_picture(file: str | Path, name: str) -> Any:
    """Read a picture, turned upright as its camera says.

    Raises:
        ValueError: If the file is not a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(file, formats=FORMATS)
        picture.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} must be a picture file, got {file}: {error}") from error
    return ImageOps.exif_transpose(picture)


def read_image(file: str | Path, channels: int, side: int | None = None) -> Tensor:
    """Read a picture as ``(1, C, H, W)`` in [-1, 1], see `pixels_of`.

    Raises:
        ValueError: If the file is not a picture.
    """
    return from_uint8(pixels_of(open_picture(file, "image"), channels, side))


def pixels_of(picture: Any, channels: int, side: int | None) -> Tensor:
    """Return the pixels ``(1, C, H, W)`` of a picture as bytes.

    With a side, the picture is cropped to its central square and resized, as training images are;
    see `flowkit.data.folder.square`.
    """
    if side is not None:
        return square(picture, side, channels)[None]
    picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2)


def read_region(cfg: DictConfig, side: int | None, x1: Tensor) -> Tensor:
    """Read the region that may change, as a mask in [0, 1] with the size of the states ``x1``.

    The file is a gray picture with the size of the photo, and is cropped and resized as the photo
    is. White pixels may change.

    Raises:
        ValueError: If the file is not a picture, or if its size is not that of the photo.
    """
    picture, photo = open_picture(cfg.region, "region"), open_picture(cfg.image, "image").size
    if picture.size != photo:
        raise ValueError(f"region must have the size of the image, {photo}, got {picture.size}")
    region = pixels_of(picture, 1, side).to(x1.device).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(region, x1.shape[-2:]).to(x1.dtype)


def describe(flowopt: FlowOpt, settings: Settings, found: Edit) -> dict[str, Any]:
    """Return a record of the settings of an edit and of its course."""
    # The noise is standard normal only at time 0.
    normal = gaussianity(found.z)._asdict() if settings.skip == 0 else {}
    return {
        "settings": {
            **settings._asdict(),
            "method": flowopt.sampler.method,
            "grid": flowopt.sampler.times.tolist(),
            "anderson": flowopt.anderson,
            "tolerance": flowopt.tolerance,
            "distance": flowopt.distance,
            "patience": flowopt.patience,
        },
        "status": found.status[0],
        "nfe": found.nfe,
        "residuals": found.residuals[:, 0].tolist(),
        "last_step_size": found.step_size.item(),
        "gaussianity": {name: round(value.item(), 4) for name, value in normal.items()} or None,
    }


def folder_of(cfg: DictConfig) -> Path:
    """Return the folder of the results; by default the edit is its name."""
    parts = [Path(cfg.image).name, cfg.source, *([] if cfg.target is None else ["to", cfg.target])]
    name = "-".join(str(part) for part in parts if part is not None)
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return Path(cfg.out) if cfg.out else results_of(cfg.run or "runs") / "edits" / name


def write(cfg: DictConfig, model: Any, image: Tensor, found: Edit, record: dict[str, Any]) -> None:
    """Write record, pictures, latent and iterates to one folder."""
    names = ("edit.json", "strip.png", "residuals.png", "edit.pt", "iterates")
    files = [folder_of(cfg) / name for name in names]
    images = torch.cat([model.decode(x).float().cpu() for x in found.trace])
    pixels = to_uint8(images)
    some = torch.linspace(0, len(images) - 1, SHOWN).long().unique()
    shown = torch.cat([image.cpu(), images[some]])
    content = {"x": found.x.cpu(), "z": found.z.cpu(), "images": pixels}
    with recording(record, files):
        save_picture(shown, files[1], columns=len(shown))
        plot(found, cfg.target is not None, files[2])
        write_atomically(files[3], lambda file: torch.save(content, file))
        shutil.rmtree(files[4], ignore_errors=True)  # of a call that was stopped here
        files[4].mkdir()
        for k, image in enumerate(pixels):
            save_image(image.permute(1, 2, 0).squeeze(-1).numpy(), files[4] / f"{k:02}.png")
    status = record["status"]
    status = f"all {len(images) - 1} iterations made" if status == "iterations" else status
    print(
        f"status    {status}, {record['nfe']} evaluations, {record['seconds']} s\n"
        f"strip     {files[1]}  the image, then the iterates\nrecord    {files[0]}"
    )


def plot(found: Edit, editing: bool, file: Path) -> None:
    """Plot the residual, or in an edit the distance to the image, over iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(
        xlabel="iteration", ylabel="distance to the image" if editing else "residual"
    )
    axes.plot(found.residuals.cpu(), "o-", ms=3)
    if not editing:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    save_figure(figure, file)


@hydra.main(version_base="1.3", config_path="../conf", config_name="edit")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit edit``."""
    edit(cfg)


if __name__ == "__main__":
    main()
