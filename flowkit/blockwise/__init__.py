"""Blockwise flow matching: networks with one small block for each segment of time.

A `Blockwise` velocity has a trunk, which computes features, and one stack of blocks per segment,
which computes the velocity. Sampling is cheaper than with one large network: each step runs one
stack only, and the features can be reused within a segment. `BlockwiseDiT` serves images and
latents, `BlockwiseMLP` serves points and small images. `allocate_steps` and `equal_burden`
distribute steps and segments over time.

Source: *Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation*, 2025 (arXiv 2510.21167).
"""

from flowkit.blockwise.alignment import (
    DINOv2,
    Projector,
    StoredTokens,
    alignment_loss,
    store_tokens,
)
from flowkit.blockwise.allocation import Allocation, allocate_steps
from flowkit.blockwise.burden import equal_burden, loss_by_time
from flowkit.blockwise.dit import BlockwiseDiT, DiTResidual, DiTStack, DiTTrunk
from flowkit.blockwise.drift import Drift, feature_drift
from flowkit.blockwise.flops import (
    Flops,
    count_flops,
    network_flops,
    part_flops,
    predicted_gain,
    solve_cost,
    step_prices,
    used_flops,
)
from flowkit.blockwise.flow import Blockwise, DriftLimit
from flowkit.blockwise.losses import blockwise_loss, draw_segments, residual_loss
from flowkit.blockwise.masked_encoder import MaskedEncoder, train_masked_encoder
from flowkit.blockwise.mlp import BlockwiseMLP, MLPResidual, MLPStack, MLPTrunk
from flowkit.blockwise.parts import PlainStack, ReuseErrors, Usage, copies

__all__ = [
    "Allocation",
    "Blockwise",
    "BlockwiseDiT",
    "BlockwiseMLP",
    "DINOv2",
    "DiTResidual",
    "DiTStack",
    "DiTTrunk",
    "Drift",
    "DriftLimit",
    "Flops",
    "MLPResidual",
    "MLPStack",
    "MLPTrunk",
    "MaskedEncoder",
    "PlainStack",
    "Projector",
    "ReuseErrors",
    "StoredTokens",
    "Usage",
    "alignment_loss",
    "allocate_steps",
    "blockwise_loss",
    "copies",
    "count_flops",
    "draw_segments",
    "equal_burden",
    "feature_drift",
    "loss_by_time",
    "network_flops",
    "part_flops",
    "predicted_gain",
    "residual_loss",
    "solve_cost",
    "step_prices",
    "store_tokens",
    "train_masked_encoder",
    "used_flops",
]
