"""flowkit: flow matching, from training to sampling, editing and measuring."""

from flowkit._version import __version__

__all__ = ["__version__"]
