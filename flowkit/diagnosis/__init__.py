"""Faults of a flow: `diagnose` looks at a network, and `Finding` is a line of the result.

``flowkit doctor`` prints the findings of a run, or of anybody's network.
"""

from flowkit.diagnosis.diagnose import diagnose
from flowkit.diagnosis.findings import Finding

__all__ = ["Finding", "diagnose"]
