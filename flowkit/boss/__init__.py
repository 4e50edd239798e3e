"""BOSS: sampling grids for few steps, optimized for a trained velocity.

`optimize_grid` makes a Bellman grid (least sum of single-step errors) and an end-point grid (least
error at the last time), and returns the better of these and the uniform grid. Use this package to
sample with about 4 to 20 steps. `segments` gives training data to straighten a flow on the chosen
grid.

Source: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
(arXiv 2312.16414).
"""

from flowkit.boss.bellman import BellmanInterval, bellman_grid, bellman_interval, converged_costs
from flowkit.boss.costs import step_costs
from flowkit.boss.endpoint import endpoint_grid
from flowkit.boss.search import OptimizedGrid, optimize_grid, score_grids, search_rows, segments

__all__ = [
    "BellmanInterval",
    "OptimizedGrid",
    "bellman_grid",
    "bellman_interval",
    "converged_costs",
    "endpoint_grid",
    "optimize_grid",
    "score_grids",
    "search_rows",
    "segments",
    "step_costs",
]
