"""BOSS: bespoke sampling grids for few steps, from step costs or from end-point errors."""

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
