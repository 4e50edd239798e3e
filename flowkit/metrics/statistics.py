"""Statistics of features: moments that are accumulated batch by batch, and their files."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.frechet import check_covariance, check_rows, frechet_from_moments
from flowkit.provenance import write_atomically

ARRAYS = {"mean": "mu", "cov": "sigma", "spatial_mean": "mu_s", "spatial_cov": "sigma_s"}
"""Names of the arrays in a file: of ADM, torch-fidelity, clean-fid and pytorch-fid."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, as a Fréchet distance needs them.

    Files of other tools hold the moments only: then the number of samples and the feature network
    are not known, and are None.

    Attributes:
        mean: Mean ``(F,)`` in float64.
        cov: Unbiased covariance ``(F, F)`` in float64.
        count: Number of samples.
        features_name: Name of the feature network.
        features_hash: Hash of the feature network.
        spatial_mean: Mean ``(S,)`` of the spatial features of sFID.
        spatial_cov: Covariance ``(S, S)`` of the spatial features.
        spatial_name: Name of the spatial features.
        reference_hash: Hash of the samples or of their features.

    Raises:
        ValueError: If a shape is wrong, a value is not finite, or a matrix is no covariance.

    >>> import tempfile
    >>> moments = Moments()
    >>> for batch in torch.eye(4, dtype=torch.float64).split(3):
    ...     moments.update(batch)
    >>> file = Path(tempfile.mkdtemp()) / "stats.npz"
    >>> moments.statistics(features_name="pixels").save(file)
    >>> found = Statistics.load(file)
    >>> found.count, found.features_name, found.mean.tolist(), found.distance(found)
    (4, 'pixels', [0.25, 0.25, 0.25, 0.25], 0.0)
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None
    features_name: str | None = None
    features_hash: str | None = None
    spatial_mean: Tensor | None = None
    spatial_cov: Tensor | None = None
    spatial_name: str | None = None
    reference_hash: str | None = None

    def __post_init__(self) -> None:
        _check("mu and sigma", self.mean, self.cov)
        if self.spatial_mean is not None or self.spatial_cov is not None:
            _check("mu_s and sigma_s", self.spatial_mean, self.spatial_cov)

    @property
    def spatial(self) -> "Statistics":
        """The statistics of the spatial features, for sFID.

        Raises:
            ValueError: If there are none.
        """
        if self.spatial_mean is None or self.spatial_cov is None:
            raise ValueError(
                "statistics must hold the fields mu_s and sigma_s for sFID, got mu and sigma "
                "only; make them from images"
            )
        known = None if self.features_name is None else f"{self.features_name}, spatial"
        return Statistics(
            self.spatial_mean,
            self.spatial_cov,
            self.count,
            self.spatial_name or known,
            self.features_hash,
            reference_hash=self.reference_hash,
        )

    def check_features(self, name: str | None, hash: str | None, dim: int) -> None:
        """Require the same feature network, as far as it is known, and number of features.

        Raises:
            ValueError: If one differs.
        """
        pairs = {"name": (name, self.features_name), "hash": (hash, self.features_hash)}
        for field, (wanted, own) in pairs.items():
            if None not in (wanted, own) and wanted != own:
                raise ValueError(
                    f"statistics must be of the feature network of {field} {wanted}, got {own}"
                )
        if len(self.mean) != dim:
            raise ValueError(
                f"statistics must be of the {dim} features of the network, got {len(self.mean)}"
            )

    def distance(self, other: "Statistics") -> float:
        """Return the squared Fréchet distance to other statistics, see `frechet_distance`.

        Raises:
            ValueError: If both name their feature network and the names or hashes differ, or if
                the numbers of features differ.
        """
        other.check_features(self.features_name, self.features_hash, len(self.mean))
        return frechet_from_moments(self.mean, self.cov, other.mean, other.cov)

    def save(self, path: str | Path) -> None:
        """Write a file ``.npz`` that torch-fidelity, clean-fid and pytorch-fid can read.

        The arrays are ``mu`` and ``sigma``, and ``mu_s`` and ``sigma_s`` for spatial features. The
        other fields have their own names. What is None is left out. ADM's evaluator also needs
        images in the array ``arr_0``, which this file lacks.
        """
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                array = value.numpy() if isinstance(value, Tensor) else np.array(value)
                found[ARRAYS.get(field.name, field.name)] = array

        def write(partial: Path) -> None:
            with partial.open("wb") as stream:  # with a name, numpy would append ".npz"
                np.savez(stream, **found)

        write_atomically(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read a file ``.npz``; no object is unpickled.

        Raises:
            ValueError: If the file is no ``.npz``, holds no ``mu`` or ``sigma``, or a field is of a
                wrong kind.
        """
        known = {ARRAYS.get(field.name, field.name): field.name for field in fields(cls)}
        try:
            # A pickled file is refused here, and a pickled field when it is read.
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            with file:
                found = {known[key]: file[key] for key in file.files if key in known}
                names = list(file.files)
        except (BadZipFile, ValueError, EOFError) as error:
            raise ValueError(f"path must be an npz file of arrays, got {path}: {error}") from error
        missing = [ARRAYS[name] for name in ("mean", "cov") if name not in found]
        if missing:
            raise ValueError(
                f"path must hold the fields mu and sigma, got {path} without "
                f"{' and '.join(missing)}; it holds {', '.join(names) or 'nothing'}"
            )
        values: dict[str, Any] = {}
        for name, array in found.items():
            if name in ARRAYS:
                if array.dtype.kind not in "fiu":
                    raise ValueError(f"{ARRAYS[name]} must hold numbers, got {array.dtype}")
                values[name] = torch.from_numpy(array.astype(np.float64))
            else:
                values[name] = int(array) if name == "count" else str(array)
        return cls(**values)


def _check(names: str, mean: Tensor | None, cov: Tensor | None) -> None:
    """Require a mean ``(F,)`` and a covariance ``(F, F)`` of finite values."""
    shapes = [None if x is None else tuple(x.shape) for x in (mean, cov)]
    if mean is None or cov is None or mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{names} must have shapes (F,) and (F, F), got {shapes[0]}, {shapes[1]}")
    if not (torch.isfinite(mean.sum()) and torch.isfinite(cov.sum())):
        raise ValueError(f"{names} must be finite, got NaN or infinite values")
    check_covariance(cov, names.split()[-1])


class Moments:
    """Mean and covariance of features ``(N, F)`` that come in batches of any size.

    The batches are joined by the means and the sums of centered squares, in float64, so that large
    means lose no digits. How the samples are split does not matter, but for rounding.

    Source: Chan, Golub & LeVeque 1983, *Algorithms for computing the sample variance*, equation
    1.5, for covariances.

    >>> moments = Moments()
    >>> moments.update(torch.tensor([[0.0], [2.0]]))
    >>> moments.update(torch.tensor([[4.0]]))
    >>> moments.count, moments.mean.item(), moments.statistics().cov.item()
    (3, 2.0, 4.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self._squares = torch.empty(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add the features ``(B, F)`` of a batch.

        Raises:
            ValueError: If the shape is wrong, or a value is not finite; the message has the number
                of the sample.
        """
        if features.ndim != 2 or (self.count and features.shape[1] != len(self.mean)):
            width = len(self.mean) if self.count else "F"
            raise ValueError(f"features must have shape (B, {width}), got {tuple(features.shape)}")
        check_rows(features, "features", self.count)
        if not len(features):
            return
        x = features.detach().to("cpu", torch.float64)
        mean, number, total = x.mean(0), len(x), self.count + len(x)
        x = x - mean
        if not self.count:
            self.mean, self._squares = mean, x.T @ x
        else:
            gap = mean - self.mean
            self._squares.addmm_(x.T, x)
            self._squares.addr_(gap, gap, alpha=self.count * number / total)
            self.mean = self.mean + gap * (number / total)
        self.count = total

    def statistics(
        self,
        spatial: "Moments | None" = None,
        *,
        features_name: str | None = None,
        features_hash: str | None = None,
        spatial_name: str | None = None,
        reference_hash: str | None = None,
    ) -> Statistics:
        """Return the statistics, with the spatial ones if they are given.

        Args:
            spatial: The moments of the spatial features of the same samples.
            features_name: See `Statistics`, as for the other names.
            features_hash: Hash of the feature network.
            spatial_name: Name of the spatial features.
            reference_hash: Hash of the samples.

        Raises:
            ValueError: If there are fewer than 2 samples, or another number of spatial features.
        """
        check_at_least(self.count, 2, "the number of samples")
        found = None
        if spatial is not None:
            if spatial.count != self.count:
                raise ValueError(
                    f"spatial must be of the same {self.count} samples, got {spatial.count}"
                )
            found = spatial.statistics()
        return Statistics(
            self.mean,
            self._squares / (self.count - 1),
            self.count,
            features_name,
            features_hash,
            None if found is None else found.mean,
            None if found is None else found.cov,
            spatial_name,
            reference_hash,
        )
