"""Frozen parts of a module: networks that it uses, but neither trains nor stores."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import nn


class Frozen(nn.Module):
    """A module with frozen parts, which it uses but neither trains nor stores.

    The class statement names the frozen parts. They are assigned like any other attribute. A frozen
    part is in ``eval`` mode and without gradients. It follows the module from device to device and
    from type to type, and it is copied with the module. It is not among the module's ``modules()``
    and ``parameters()``: no optimizer, average of weights, ``train()`` or ``state_dict`` sees it. A
    value that is not an ``nn.Module``, for example a function, is stored unchanged.

    A subclass adds its names to the names of its parents.

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
        """Assign an attribute. A frozen part is stored where torch does not look for modules."""
        if name not in self.frozen_parts:
            super().__setattr__(name, value)
            return
        if isinstance(value, nn.Module):
            value.eval().requires_grad_(False)
        self.__dict__[name] = value

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Apply a conversion of tensors, for example ``.to(device)``, to frozen parts too."""
        for name in self.frozen_parts:
            if isinstance(part := self.__dict__.get(name), nn.Module):
                part._apply(fn, recurse)
        return super()._apply(fn, recurse)
