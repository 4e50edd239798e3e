"""flowkit: flow matching, from training to sampling, editing and measuring."""

from pathlib import Path as _Path

from flowkit._version import __version__

# In a checkout recipes/ and conf/ lie beside this package; in a wheel they lie inside it.
if not (_Path(__file__).parent / "recipes").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = ["__version__"]
