"""Parts that a module uses and does not own: frozen networks beside the one in training."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn


class Frozen(nn.Module):
    """A module of which some parts are frozen: used, but neither trained nor stored with it.

    A part is named with the class and assigned as any other attribute. It then is in ``eval`` mode
    and without gradients, follows the module from device to device and from type to type, and is
    copied with it. It is not among its ``modules()`` and ``parameters()``: no optimizer, average of
    weights, ``train()`` or ``state_dict`` sees it. What is no ``nn.Module``, a function say, is
    kept as it is.

    A subclass adds its names to those of its parents.

    >>> import torch
    >>> class Learner(Frozen, frozen=("teacher",)):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.student, self.teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> learner = Learner().to(torch.float64)
    >>> learner.teacher.weight.dtype, learner.teacher.weight.requires_grad
    (torch.float64, False)
    >>> sorted(learner.state_dict())
    ['student.bias', 'student.weight']
    """

    frozen_parts: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen parts."""

    def __init_subclass__(cls, frozen: tuple[str, ...] = (), **options: Any) -> None:
        """Add the names of a class's frozen parts."""
        super().__init_subclass__(**options)
        cls.frozen_parts = cls.frozen_parts | set(frozen)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; a frozen part goes where torch does not look for parts."""
        if name not in self.frozen_parts:
            super().__setattr__(name, value)
            return
        if isinstance(value, nn.Module):
            value.eval().requires_grad_(False)
        self.__dict__[name] = value

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        for name in self.frozen_parts:
            if isinstance(part := self.__dict__.get(name), nn.Module):
                part._apply(fn, recurse)
        return super()._apply(fn, recurse)
