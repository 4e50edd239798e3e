"""Points and settings that the tests of couplings share."""

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(seed: int, batch: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, batch, *shape, generator=seeded(seed))
    return x[0], x[1]
