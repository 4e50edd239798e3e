"""Couplings: rules that pair source samples with data, with or without weights.

A coupling takes a batch of noise ``x0`` and a batch of data ``x1`` and returns pairs. `Independent`
keeps the pairs as they come and is the default. `MinibatchOT` and `Sinkhorn` pair by optimal
transport within the batch, which makes paths straighter. `Gibbs` weights independent pairs instead
and needs no transport solver; `Division`, `Potentials` and `RowSoftmax` correct its bias.

Sources: Tong et al., 2023 (arXiv 2302.00482); Cheng and Schwing, 2025 (arXiv 2503.10636);
Calvo-Ordoñez et al., 2025 (arXiv 2507.22270).
"""

from flowkit.couplings.basic import Coupling, Independent, MinibatchOT, Sinkhorn
from flowkit.couplings.debiasing import Division, Potentials, RowSoftmax
from flowkit.couplings.epsilon import EpsilonChoice, suggest_epsilon
from flowkit.couplings.gibbs import Gibbs
from flowkit.couplings.transport import cost_matrix
from flowkit.types import Pairs

__all__ = [
    "Coupling",
    "Division",
    "EpsilonChoice",
    "Gibbs",
    "Independent",
    "MinibatchOT",
    "Pairs",
    "Potentials",
    "RowSoftmax",
    "Sinkhorn",
    "cost_matrix",
    "suggest_epsilon",
]
