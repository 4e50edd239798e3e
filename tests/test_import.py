"""What ``import flowkit`` brings along."""

import subprocess
import sys

HEAVY = {"scipy", "diffusers", "lightning", "hydra", "omegaconf", "torchmetrics", "ot"}
HEAVY |= {"torchdiffeq", "matplotlib", "sklearn", "PIL", "transformers", "datasets"}


def test_importing_flowkit_loads_torch_and_nothing_heavier():
    script = "import sys, torch; before = set(sys.modules); import flowkit; "
    script += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "flowkit" in loaded
    assert not loaded & HEAVY
