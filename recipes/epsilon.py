"""Choose the epsilon of weighted flow matching from samples, without training.

flowkit epsilon data.source=8gaussians data.target=moons
flowkit epsilon data=digits target=ess value=0.5
"""

import math
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from flowkit.checks import check_at_least
from flowkit.couplings import EpsilonChoice, cost_matrix, suggest_epsilon
from flowkit.couplings.epsilon import variance_components
from flowkit.metrics.pictures import save_figure
from flowkit.places import check_writable
from flowkit.runs.diagnosing import encoded
from flowkit.runs.records import recording
from flowkit.runs.splits import prepared


def epsilon(cfg: DictConfig) -> EpsilonChoice:
    """Choose as configured; write ``epsilon.json`` and ``epsilon.png``."""
    check_writable(Path(cfg.out), "out")
    data = prepared(instantiate(cfg.data))
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(data.train), generator=generator)[: cfg.num_samples]
    check_at_least(len(order), 2, "num_samples")
    batch = data.train[order]
    x1 = encoded(instantiate(cfg.autoencoder), batch["x1"], cfg.batch_size, generator)
    x0 = batch.get("x0")
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator)
    choice = suggest_epsilon(x0, x1, cfg.cost, cfg.target, cfg.value)
    x0_part, x1_part, rest = (v.item() for v in variance_components(cost_matrix(x0, x1, cfg.cost)))
    share = rest / (x0_part + x1_part + rest)
    _print(choice, math.sqrt(x1[0].numel()), share)

    files = [Path(cfg.out) / name for name in ("epsilon.json", "epsilon.png")]
    curves = {name: value.tolist() for name, value in choice._asdict().items() if name != "epsilon"}
    record = {
        "epsilon": choice.epsilon,
        "interaction": share,
        **{key: cfg[key] for key in ("cost", "target", "value", "seed")},
        "num_samples": len(x1),
        "data": {"name": type(data).__name__, "train": data.fingerprint("train")},
        **curves,
    }
    with recording(record, files):
        save_figure(choice.plot(), files[1])
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return choice


def _print(choice: EpsilonChoice, scale: float, share: float) -> None:
    """Print every fifth row of the curves, and the row nearest to the choice."""
    nearest = int((choice.epsilons.log() - math.log(choice.epsilon)).abs().argmin())
    print("  epsilon   epsilon/√d   ESS/N   tilt variance")
    for k, epsilon in enumerate(choice.epsilons.tolist()):
        if k % 5 == 0 or k == nearest:
            numbers = f"{choice.ess[k]:7.3f} {choice.tilt_variance[k]:13.4f}"
            mark = "  <-" if k == nearest else ""
            print(f"{epsilon:9.3f} {epsilon / scale:12.3f} {numbers}{mark}")
    print(f"epsilon   {choice.epsilon:.4g}")
    print(f"{share:.1%} of the cost's variance chooses partners, the rest tilts source and data")


@hydra.main(version_base="1.3", config_path="../conf", config_name="epsilon")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit epsilon``."""
    epsilon(cfg)


if __name__ == "__main__":
    main()
