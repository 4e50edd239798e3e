"""Train a small encoder, and store its tokens to align the trunk of a blockwise flow.

flowkit tokens data=digits hydra.run.dir=runs/tokens
flowkit tokens data=digits encoder=dinov2 encoder.model=folder/of/dinov2      tokens of DINOv2

The same command continues a stopped call. Then train a blockwise flow with the tokens:

flowkit train module=blockwise encoder@module.encoder=stored \
    module.encoder.file=runs/tokens/tokens.safetensors
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit.blockwise import MaskedEncoder, StoredTokens, store_tokens, train_masked_encoder
from flowkit.checks import usable_device
from flowkit.data import SplitData
from flowkit.provenance import write_json
from flowkit.runs.records import kept_record, recorded
from flowkit.runs.splits import prepared

RECORD, ENCODER, TOKENS = "tokens.json", "encoder.safetensors", "tokens.safetensors"


def tokens(cfg: DictConfig) -> Path:
    """Run as configured; write ``tokens.safetensors``, and ``encoder.safetensors`` after training.

    Files that an earlier call with the same settings wrote are not made again.

    Returns:
        The file of tokens, or of the encoder if tokens are not stored.

    Raises:
        ValueError: If the folder holds other tokens or another encoder.
    """
    device = usable_device(cfg.device)
    data = prepared(instantiate(cfg.data))
    out = Path(cfg.out)
    _begin(out, cfg, data)
    encoder = trained(cfg, data, out) if cfg.encoder is None else instantiate(cfg.encoder)()
    if isinstance(encoder, torch.nn.Module):
        encoder.to(device)
    if not cfg.store:
        return out / ENCODER
    file = out / TOKENS
    if file.is_file():
        count = len(StoredTokens(file).rows)
    else:
        batches = list(images(data, cfg.batch_size))
        on_device = (batch.to(device) for batch in tqdm(batches, desc="tokens", disable=None))
        count = store_tokens(file, on_device, encoder)
    print(f"tokens    {file}, of {count:,} images")
    return file


def _begin(out: Path, cfg: DictConfig, data: SplitData) -> None:
    """Write the record of what the files depend on, unless they depend on something else."""
    settings = recorded(cfg)
    record = {name: settings[name] for name in ("encoder", "sizes", "steps", "batch_size", "seed")}
    record |= {name: data.fingerprint(name) for name in ("train", "val")}
    record["mirrored"] = data.flip
    if any((out / name).exists() for name in (ENCODER, TOKENS)):
        there = kept_record(out / RECORD)
        if differing := [name for name, value in record.items() if there.get(name) != value]:
            raise ValueError(
                f"hydra.run.dir must be a new folder or hold the same tokens, got {out} with "
                f"another {differing[0]}; flows may depend on these: choose another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)


def trained(cfg: DictConfig, data: SplitData, out: Path) -> MaskedEncoder:
    """Train an encoder on masked patches, and save the encoder; or load that of a stopped call."""
    file = out / ENCODER
    if file.is_file():
        return MaskedEncoder.load(file)
    bar = tqdm(total=cfg.steps, desc="encoder", disable=None)

    def report(step: int, loss: float) -> None:
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss:.4f}")

    net = train_masked_encoder(
        data.train[:]["x1"].to(cfg.device),
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        report=report,
        **cfg.sizes,
    )
    bar.close()
    net.save(file)
    print(f"encoder   {file}, held-out loss {held_out(net, data):.4f}")
    return net


@torch.no_grad()
def held_out(net: MaskedEncoder, data: SplitData) -> float:
    """Return the loss of the first 1000 test images under fixed masks."""
    test = data.test[:1000]["x1"]
    generator, count = torch.Generator().manual_seed(0), len(net.patches.positions)
    mask = torch.rand(len(test), count, generator=generator) < 0.6
    device: Any = next(net.parameters()).device
    return net.loss(test.to(device), mask.to(device)).item()


def images(data: SplitData, batch_size: int) -> Iterator[Tensor]:
    """Yield all images of training and validation; also mirrored ones if training mirrors."""
    for name in ("train", "val"):
        split = data.split(name)
        for first in range(0, len(split), batch_size):
            batch = split[first : first + batch_size]["x1"]
            yield batch
            if data.flip and name == "train":
                yield batch.flip(-1)


@hydra.main(version_base="1.3", config_path="../conf", config_name="tokens")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit tokens``."""
    tokens(cfg)


if __name__ == "__main__":
    main()
