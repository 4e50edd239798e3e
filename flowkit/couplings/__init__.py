"""Couplings: which noise goes with which data, and with what weight."""

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
