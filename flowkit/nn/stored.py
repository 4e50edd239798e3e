"""Networks in one file: their weights, and the arguments that build them again."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from flowkit.provenance import parse_json, write_atomically


class Stored(nn.Module):
    """A network that is stored in one safetensors file. Reading the file runs no code of it.

    A subclass sets ``config`` to the arguments that build the network, as plain types.

    >>> import tempfile, torch
    >>> class Scale(Stored):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.config, self.scale = {"width": width}, nn.Parameter(torch.ones(width))
    >>> Scale(3).save(file := tempfile.mkdtemp() + "/scale.safetensors")
    >>> Scale.load(file).scale
    Parameter containing:
    tensor([1., 1., 1.])
    """

    config: dict[str, Any]
    """Arguments of the class, as types that JSON has."""

    def save(self, file: str | Path) -> None:
        """Write weights and ``config`` to a file, whose folder must exist."""
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        metadata = {"config": json.dumps(self.config)}
        write_atomically(Path(file), partial(save_file, weights, metadata=metadata))

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a network that `save` wrote.

        Returns:
            The network on the CPU, in ``eval`` mode, without gradients.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If `save` did not write the file, or the class now builds another network.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(file).is_file():
            raise FileNotFoundError(f"file must be one of {cls.__name__}.save, got {file}")
        try:
            with safe_open(file, framework="pt") as stored:
                config = parse_json((stored.metadata() or {})["config"], file)
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"file must be written by {cls.__name__}.save, got {file}") from error
        try:
            net = cls(**config)
            net.load_state_dict(weights)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            words = " ".join(str(error).split())
            raise ValueError(
                f"file must be of this version's {cls.__name__}, got {file} of another version or "
                f"class: {words}"
            ) from error
        return net.eval().requires_grad_(False)
