"""Names of earlier versions and their names now, so that old runs still load."""

from typing import Any

# Earlier dotted name of an object or a module, and its name now.
NAMES = {
    "flowkit.allocation": "flowkit.blockwise",
    "flowkit.anderson": "flowkit.flowopt.anderson",
    "flowkit.assignment": "flowkit.couplings.transport",
    "flowkit.assignment.cost_matrix": "flowkit.couplings.cost_matrix",
    "flowkit.bellman": "flowkit.boss",
    "flowkit.codebook": "flowkit.symmetrical.codebook",
    "flowkit.codecs": "flowkit.symmetrical",
    "flowkit.costs": "flowkit.boss",
    "flowkit.data.latents": "flowkit.data",
    "flowkit.data.pairs": "flowkit.data",
    "flowkit.data.toy.sample": "flowkit.data.sample_toy",
    "flowkit.debiasing": "flowkit.couplings",
    "flowkit.endpoint": "flowkit.boss",
    "flowkit.epsilon": "flowkit.couplings",
    "flowkit.gibbs": "flowkit.couplings",
    "flowkit.joint": "flowkit.symmetrical",
    "flowkit.labelstates": "flowkit.symmetrical",
    "flowkit.labelstates.LabelledImages": "flowkit.symmetrical.LabeledImages",
    "flowkit.metrics.kernel": "flowkit.metrics",
    "flowkit.metrics.provenance": "flowkit.provenance",
    "flowkit.metrics.quantize": "flowkit.metrics",
    "flowkit.metrics.wasserstein": "flowkit.metrics",
    "flowkit.modules.blockwise": "flowkit.modules",
    "flowkit.modules.callbacks": "flowkit.modules",
    "flowkit.modules.condition_grid": "flowkit.modules",
    "flowkit.modules.latent": "flowkit.modules",
    "flowkit.modules.runs": "flowkit.modules",
    "flowkit.modules.sharding": "flowkit.modules",
    "flowkit.modules.straightening": "flowkit.modules",
    "flowkit.modules.weighted": "flowkit.modules",
    "flowkit.nn.Blockwise": "flowkit.blockwise.Blockwise",
    "flowkit.nn.BlockwiseDiT": "flowkit.blockwise.BlockwiseDiT",
    "flowkit.nn.BlockwiseMLP": "flowkit.blockwise.BlockwiseMLP",
    "flowkit.nn.alignment": "flowkit.blockwise",
    "flowkit.nn.blockwise": "flowkit.blockwise",
    "flowkit.nn.blockwise_dit": "flowkit.blockwise",
    "flowkit.nn.blockwise_mlp": "flowkit.blockwise",
    "flowkit.nn.companions": "flowkit.nn",
    "flowkit.nn.drift": "flowkit.blockwise",
    "flowkit.nn.edges": "flowkit.blockwise",
    "flowkit.nn.flops": "flowkit.blockwise",
    "flowkit.nn.kl": "flowkit.nn",
    "flowkit.nn.masked": "flowkit.blockwise",
    "flowkit.nn.parts": "flowkit.blockwise",
    "flowkit.nn.planes": "flowkit.symmetrical",
    "flowkit.objectives": "flowkit.flowopt",
    "flowkit.ranks": "flowkit.distributed",
    "flowkit.recipes.autoencoder": "flowkit.runs",
    "flowkit.recipes.evaluate": "flowkit.runs",
    "flowkit.recipes.report.saved": "flowkit.runs.saved_grid",
    "flowkit.solvers": "flowkit.sampling",
    "flowkit.stepbound": "flowkit.flowopt",
}

# Earlier options of a class, and their names now. None: the option had no effect and is removed.
KEYS: dict[str, dict[str, str | None]] = {
    "flowkit.modules.BlockwiseFlowMatching": {"target": None},
    "flowkit.modules.SymmetricalFlowMatching": {"edges": "boundary_share"},
}


def current(node: Any) -> Any:
    """Return a stored configuration with the names of this version.

    >>> current({"_target_": "flowkit.nn.planes.NoisePath", "channels": 1})
    {'_target_': 'flowkit.symmetrical.NoisePath', 'channels': 1}
    """
    if isinstance(node, list):
        return [current(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: current(value) for key, value in node.items()}
    if isinstance(node.get("_target_"), str):
        node["_target_"] = current_name(node["_target_"])
        keys = KEYS.get(node["_target_"], {})
        renamed = {keys.get(key, key): value for key, value in node.items()}
        node = {key: value for key, value in renamed.items() if key is not None}
    return node


def current_name(name: str) -> str:
    """Return the dotted name that an object of an earlier version has now.

    >>> current_name("flowkit.codecs.OneHot")
    'flowkit.symmetrical.OneHot'
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):  # the object's name comes before its module's
        if (now := NAMES.get(".".join(parts[:cut]))) is not None:
            return ".".join([now, *parts[cut:]])
    return name
