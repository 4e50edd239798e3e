"""Train a KL autoencoder on images, for flows on its latents.

flowkit autoencoder hydra.run.dir=runs/autoencoder             on the digits
flowkit autoencoder data=fashion_mnist hydra.run.dir=runs/autoencoder
flowkit autoencoder data=folder data.root=photos data.image_size=64 vae.multipliers=[1,2,4,4]
flowkit autoencoder resume=runs/autoencoder                    continue a stopped run

``flowkit encode`` and ``AutoencoderKL.from_pretrained`` of diffusers read the folder.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import flowkit.recipes._resolvers  # noqa: F401  # functions that configurations refer to
from flowkit.autoencoders import KLAutoencoder
from flowkit.checks import usable_device
from flowkit.data import SplitData
from flowkit.metrics import Features, image_metrics, to_uint8
from flowkit.metrics.pictures import save_picture
from flowkit.modules import LastCheckpoint, LossPlot
from flowkit.modules.autoencoding import Autoencoding
from flowkit.modules.callbacks import LastValidation, StepProgress, StopOnInterrupt
from flowkit.modules.checkpoints import (
    CHECKPOINT,
    CONFIG,
    UNRESOLVED,
    newest_checkpoint,
    read_checkpoint,
)
from flowkit.modules.logs import LOSSES, plot_losses, read_rows
from flowkit.provenance import versions, write_json, write_text
from flowkit.runs.epochs import count_in_steps
from flowkit.runs.known_data import record_of, write_data_record
from flowkit.runs.locks import locked
from flowkit.runs.logs import Settings, build_loggers, logging_to
from flowkit.runs.processes import check_trainer, quiet
from flowkit.runs.records import composed, kept_record, recorded
from flowkit.runs.resuming import (
    check_unfinished,
    continued,
    find_checkpoint,
    folder_of,
    resumed,
)
from flowkit.runs.splits import opened
from flowkit.runs.tables import titled

METRICS = "metrics.json"  # written last


def autoencoder(cfg: DictConfig) -> KLAutoencoder:
    """Train as configured; write the network with its scale, ``metrics.json`` and a picture."""
    quiet()
    began, folder, device = time.perf_counter(), Path(cfg.run_dir), usable_device(cfg.device)
    unresolved = composed(cfg)  # now, since building parts resolves their references
    check_trainer(cfg.trainer)
    checkpoint = None if cfg.resume is None else find_checkpoint(Path(cfg.resume))
    _refuse_overwriting(folder, checkpoint)
    # Killed after the training, before the last file: the network is still to be written.
    trained = checkpoint is not None and _only_unwritten(cfg, checkpoint)
    if checkpoint is not None and not trained:
        step = continued(checkpoint)["global_step"]
        check_unfinished(checkpoint, step, cfg.trainer.max_steps)
    seed_everything(cfg.seed, workers=True, verbose=False)
    origin = None if checkpoint is None else folder_of(checkpoint)
    data = opened(instantiate(cfg.data), record_of(origin), cfg.data_changed)
    count_in_steps(cfg, data)
    cfg.shape, cfg.num_classes = list(data.shape), data.num_classes
    vae, perceptual = instantiate(cfg.vae), instantiate(cfg.perceptual)
    module = Autoencoding(
        vae,
        cfg.kl_weight,
        perceptual and perceptual(data),
        cfg.perceptual_weight,
        instantiate(cfg.optimizer),
        instantiate(cfg.lr_scheduler),
    )
    features: Features = instantiate(cfg.metric)(data)  # before the work, since it may fail
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"model     {type(vae).__name__}, {parameters:,} parameters, images {data.shape}")
    with locked(folder):
        _refuse_overwriting(folder, checkpoint)  # another training may just have ended
        write_text(folder / CONFIG, OmegaConf.to_yaml(recorded(cfg)))
        write_text(folder / UNRESOLVED, unresolved)
        write_data_record(folder, data, recorded(cfg)["data"])
        if checkpoint is not None and trained:
            module.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
            for table in folder.glob("logs/version_0/metrics.csv"):
                plot_losses(read_rows(table), folder / LOSSES)  # a kill may have left it out
        else:
            _fit(cfg, module, data, folder, checkpoint)
        network = KLAutoencoder(vae.to(device))
        images = (batch["x1"] for batch in data.dataloader("train", cfg.batch_size))
        network.fit_scale(_until(images, cfg.num_scale_images))
        network.save_pretrained(folder)
        _measure(cfg, network, data, features, began)
    return network


def _only_unwritten(cfg: DictConfig, checkpoint: Path) -> bool:
    """Return True if the folder has a checkpoint of the last step, and no metrics of this step."""
    if kept_record(Path(cfg.run_dir) / METRICS).get("steps") == cfg.trainer.max_steps:
        return False
    own = checkpoint.resolve().is_relative_to(Path(cfg.run_dir).resolve())
    return own and 0 <= cfg.trainer.max_steps <= read_checkpoint(checkpoint)["global_step"]


def _measure(
    cfg: DictConfig, network: KLAutoencoder, data: SplitData, features: Features, began: float
) -> None:
    """Measure reconstructions; write and print the metrics."""
    folder = Path(cfg.run_dir)
    metrics, pictures = measure(network, data, features, cfg.num_samples, cfg.seed)
    record = {
        "metrics": metrics,
        "autoencoder": network.hash,
        "latents": {
            "shape": list(network.latent_shape(data.shape)),
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
        },
        "steps": cfg.trainer.max_steps,
        "seconds": round(time.perf_counter() - began, 1),
        "data": {"name": type(data).__name__, "test": data.fingerprint("test")},
        "versions": versions(),
    }
    picture = save_picture(pictures, folder / "reconstructions.png")
    write_json(folder / METRICS, record)
    rows = {
        "PSNR of reconstructions": f"{metrics['psnr']:.2f} dB",
        titled(f"Fréchet distance ({features.name})", "frechet_distance", [metrics]): (
            f"{metrics['frechet_distance']:.3f}"
        ),
        "  floor: training images": f"{metrics['floor']['frechet_distance']:.3f}",
    }
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")
    losses = folder / LOSSES
    print(f"picture   {picture}" + (f"\nlosses    {losses}" if losses.is_file() else ""))
    print(f"network   {folder}")


def _refuse_overwriting(folder: Path, checkpoint: Path | None) -> None:
    """Raise if the folder holds another autoencoder than the resumed one."""
    trained = newest_checkpoint(folder)
    if checkpoint is not None and trained is not None and checkpoint.samefile(trained):
        return
    if trained is not None or (folder / "config.json").exists():
        raise FileExistsError(
            f"hydra.run.dir must hold no autoencoder, got {folder}; flows may depend on this "
            f"autoencoder: choose another folder, or continue its training by resume={folder}"
        )


def _fit(
    cfg: DictConfig, module: Autoencoding, data: SplitData, folder: Path, checkpoint: Path | None
) -> None:
    """Train with Lightning, from a checkpoint if there is one."""
    callbacks: list[Any] = [
        LastCheckpoint((folder / CHECKPOINT).parent, cfg.trainer.val_check_interval),
        LossPlot(folder),
        Settings(folder, recorded(cfg)),
        LastValidation(),
        StopOnInterrupt(folder),
    ]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    made = 0 if checkpoint is None else read_checkpoint(checkpoint)["global_step"]
    loggers = build_loggers(cfg.logger, folder, made)
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    with logging_to(loggers):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=checkpoint and True)


def _until(batches: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    """Yield batches until ``limit`` rows are reached."""
    count = 0
    for batch in batches:
        yield batch
        count += len(batch)
        if count >= limit:
            return


@torch.inference_mode()
def measure(
    network: KLAutoencoder, data: SplitData, features: Features, num_samples: int, seed: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Compare test images with their reconstructions.

    Returns:
        Metrics and a picture. The metrics are those of `flowkit.metrics.image_metrics`, and
        ``psnr`` in decibels, from the mean squared error over all 8-bit images. The picture has
        rows of images, each above the row of its reconstructions.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    test, device = data.test[:num_samples]["x1"], network.mean.device
    generator = torch.Generator(device).manual_seed(seed)
    parts = tqdm(test.split(64), desc="reconstructing", leave=False, disable=None)
    decoded = torch.cat(
        [network.decode(network.encode(part.to(device), generator)).cpu() for part in parts]
    )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    train = data.train[order[: len(test)]]["x1"]
    metrics = image_metrics(
        train, test, decoded, features, generator=torch.Generator().manual_seed(seed)
    )
    pixels = [to_uint8(x).float() for x in (decoded, test)]
    psnr = peak_signal_noise_ratio(*pixels, data_range=255.0).item()
    columns = min(10, len(test))
    rows = min(4, len(test) // columns)
    both = [x[: rows * columns].unflatten(0, (rows, columns)) for x in (test, decoded)]
    return {"psnr": psnr, **metrics}, torch.stack(both, 1).flatten(0, 2)


@hydra.main(version_base="1.3", config_path="../conf", config_name="autoencoder")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit autoencoder``."""
    if cfg.resume is not None and Path(cfg.resume).is_dir():
        cfg = resumed(cfg, list(HydraConfig.get().overrides.task))
    autoencoder(cfg)


if __name__ == "__main__":
    main()
