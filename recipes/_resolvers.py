"""Functions that the files of the configuration refer to."""

import math
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from flowkit.hub import results_of

RESOLVERS = {
    # A resumed run keeps its own folder; Hydra would make a new folder.
    "run_folder": lambda old, new: old if old is not None and Path(old).is_dir() else new,
    # The first value that is not null.
    "first_given": lambda *values: next(value for value in values if value is not None),
    # The folder for results of a run, which is not that of a model from elsewhere.
    "results_of": lambda run: None if run is None else str(results_of(run)),
    # The folder of the first of several runs.
    "first": lambda runs: runs if isinstance(runs, str) else runs[0],
    # Batches between validations: a run has four at least, and one every 1000 batches at least.
    "quarter": lambda steps: 1000 if steps < 0 else min(1000, max(1, -(-steps // 4))),
    # Shapes of networks within other networks, see flowkit.symmetrical.networks.
    "flat": lambda image, state: ListConfig([math.prod(image) + state[0] - image[0]]),
    "one_more_channel": lambda state: ListConfig([state[0] + 1, *state[1:]]),
}
for name, resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)
