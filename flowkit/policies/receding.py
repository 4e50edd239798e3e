"""Execution of chunks: decode H actions, execute some of them, decode again."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowkit.checks import check_at_least


class RecedingHorizon:
    """Policy of single actions: ``control(obs) -> action (D,)``, from one that decodes chunks.

    A chunk is decoded, ``execute`` of its actions are given out one by one, then the next chunk is
    decoded. So ``L`` steps take ``⌈L / execute⌉`` solves. A few actions a chunk follow the
    observations; decoding at every step changes its mind between equally good ways.

    With ``prefix=p``, the next chunk is decoded while ``p`` actions of the last one are still to be
    executed, as on a robot that does not wait. These begin the new chunk and are held fixed. They
    are always actions that will be executed: the first chunk of an episode has no prefix. A prefix
    of zeros would mean the mean action.

    Args:
        policy: Called as ``policy(obs)``, and ``policy(obs, prefix)`` with actions ``(p, D)``;
            returns a chunk ``(H, D)``. Its ``reset(seed)`` is called if it has one.
        execute: Actions ``k`` executed of a chunk, at least 1.
        prefix: Actions ``p`` held fixed; None for none.

    Attributes:
        seconds: The time of each solve since the beginning.

    Raises:
        ValueError: If ``execute`` is below 1 or ``prefix`` negative; at a call, if a chunk has
            fewer than ``p + k`` actions.

    >>> control = RecedingHorizon(lambda obs: obs + torch.arange(4.0)[:, None], execute=2)
    >>> [control(torch.tensor([10.0 * step])).item() for step in range(5)], len(control.seconds)
    ([0.0, 1.0, 20.0, 21.0, 40.0], 3)
    """

    def __init__(
        self, policy: Callable[..., Tensor], execute: int = 7, prefix: int | None = None
    ) -> None:
        check_at_least(execute, 1, "execute")
        check_at_least(prefix or 0, 0, "prefix")
        self.policy, self.execute, self.prefix = policy, execute, prefix or 0
        self.seconds: list[float] = []
        self.left: deque[Tensor] = deque()

    @property
    def decodes(self) -> bool:
        """True if the next call decodes a chunk: only then it looks at its observation."""
        return len(self.left) <= self.prefix

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: forget what is left of the last one."""
        self.left.clear()
        again: Any = getattr(self.policy, "reset", None)
        if again is not None:
            again(seed)

    def __call__(self, obs: Any) -> Tensor:
        """Return the next action ``(D,)``."""
        if self.decodes:
            self._decode(obs)
        return self.left.popleft()

    def _decode(self, obs: Any) -> None:
        """Replace what is left by a new chunk, which begins with it."""
        held, begun = torch.stack(list(self.left)) if self.left else None, time.perf_counter()
        chunk = self.policy(obs) if held is None else self.policy(obs, held)
        self.seconds.append(time.perf_counter() - begun)
        needed = self.prefix + self.execute
        if len(chunk) < needed:
            raise ValueError(
                f"execute and prefix must fit a chunk of {len(chunk)} actions, got {self.execute} "
                f"and {self.prefix}"
            )
        self.left = deque(chunk[:needed])
