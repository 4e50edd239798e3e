"""Statistics of features: sums over batches, and files of other tools."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit.metrics import Moments, Statistics, frechet_distance, frechet_from_moments
from tests.metrics.samples import F64, normal


def moments_of(parts):
    moments = Moments()
    for part in parts:
        moments.update(part)
    return moments


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 9))
@settings(max_examples=30)
def test_any_split_gives_the_same_moments(sizes, seed):
    """Features far from 0, where sums of squares would lose eight digits."""
    x = 1e4 + normal(sum(sizes) + 2, 5, seed=seed) @ normal(5, 5, seed=1)
    split = moments_of(x.split([*sizes, 2])).statistics()
    assert split.count == len(x)
    torch.testing.assert_close(split.mean, x.mean(0), rtol=1e-12, atol=0)
    centered = x - x.mean(0)
    exact = centered.T @ centered / (len(x) - 1)
    torch.testing.assert_close(split.cov, exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item())


def test_half_precision_is_added_in_float64():
    x = (1000 + normal(4000, 3)).half()
    found = moments_of(x.split(7)).statistics()
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.cov, x.double().T.cov(), rtol=1e-10, atol=1e-12)


def test_distances_of_statistics_are_those_of_the_features():
    a, b = normal(90, 6), 2 * normal(70, 6, seed=1) + 1
    found = [moments_of(x.split(11)).statistics() for x in (a, b)]
    assert found[0].distance(found[1]) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert found[0].distance(found[1]) == pytest.approx(found[1].distance(found[0]), rel=1e-10)
    assert found[0].distance(found[0]) == pytest.approx(0, abs=1e-12)


def test_files_have_the_names_of_other_tools_and_come_back(tmp_path):
    x, y = normal(20, 3), normal(20, 7, seed=1)
    names = {"features_name": "net", "features_hash": "12", "reference_hash": "34"}
    wrote = moments_of([x]).statistics(moments_of([y]), spatial_name="layer", **names)
    wrote.save(tmp_path / "stats")  # no ".npz" is appended
    with np.load(tmp_path / "stats") as file:  # refuses pickles
        assert {*file.files} >= {"mu", "sigma", "mu_s", "sigma_s"}
        np.testing.assert_allclose(file["mu"], x.mean(0).numpy(), rtol=1e-14)
        np.testing.assert_allclose(file["sigma_s"], np.cov(y.numpy(), rowvar=False), rtol=1e-12)
    read = Statistics.load(tmp_path / "stats")
    for name, value in vars(wrote).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(getattr(read, name), value), name
    assert read.spatial.features_name == "layer"
    assert torch.equal(read.spatial.mean, wrote.spatial_mean)
    # Of another tool: the moments alone, in any precision, beside arrays of images.
    np.savez(tmp_path / "ours.npz", mu=np.float32([1, 2]), sigma=np.eye(2), arr_0=np.zeros(3))
    other = Statistics.load(tmp_path / "ours.npz")
    assert (other.count, other.features_name, other.cov.dtype) == (None, None, F64)
    assert other.mean.tolist() == [1, 2]


def test_a_missing_field_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3), mu=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"must hold the fields mu and sigma, got .*a.npz without sig"
    ):
        Statistics.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(
        ValueError, match="must hold the fields mu_s and sigma_s for sFID, got mu and"
    ):
        Statistics.load(tmp_path / "b.npz").spatial  # noqa: B018
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2))
    with pytest.raises(ValueError, match=r"mu_s and sigma_s must have shapes .* got \(2,\), None"):
        Statistics.load(tmp_path / "c.npz")


def test_files_that_hold_objects_or_text_are_refused(tmp_path):
    objects = np.array([print, 1], dtype=object)
    np.savez(tmp_path / "a.npz", mu=objects, sigma=np.eye(2))
    with pytest.raises(ValueError, match="path must be an npz file of arrays, got"):
        Statistics.load(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("mu")
    with pytest.raises(ValueError, match="path must be an npz file of arrays, got"):
        Statistics.load(tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", np.eye(2))
    with pytest.raises(ValueError, match="path must be an npz file of arrays, got"):
        Statistics.load(tmp_path / "c.npy")
    np.savez(tmp_path / "d.npz", mu=np.array(["a"]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="mu must hold numbers, got <U1"):
        Statistics.load(tmp_path / "d.npz")


def test_statistics_of_another_network_do_not_compare():
    x, moments = normal(20, 3), moments_of([normal(20, 3)])
    own = moments.statistics(features_name="a", features_hash="1")
    assert own.distance(moments.statistics()) == 0  # of an unknown network
    with pytest.raises(ValueError, match="must be of the feature network of name a, got b"):
        own.distance(moments.statistics(features_name="b", features_hash="1"))
    with pytest.raises(ValueError, match="must be of the feature network of hash 1, got 2"):
        own.distance(moments.statistics(features_name="a", features_hash="2"))
    with pytest.raises(ValueError, match="must be of the 3 features of the network, got 2"):
        own.distance(moments_of([x[:, :2]]).statistics())


def test_the_image_of_a_value_that_is_not_finite_is_named():
    moments = moments_of([normal(10, 3)])
    bad = normal(5, 3)
    bad[2, 1], bad[4] = math.nan, math.inf
    with pytest.raises(
        ValueError, match="got 4 NaN or infinite of 15 values, the first in sample 12"
    ):
        moments.update(bad)
    assert moments.count == 10
    with pytest.raises(ValueError, match=r"features must have shape \(B, 3\), got \(2, 4\)"):
        moments.update(normal(2, 4))
    with pytest.raises(ValueError, match="the number of samples must be at least 2, got 1"):
        moments_of([normal(1, 3)]).statistics()
    with pytest.raises(ValueError, match="spatial must be of the same 10 samples, got 9"):
        moments.statistics(moments_of([normal(9, 2)]))


def test_matrices_that_are_no_covariance_are_refused():
    """Not symmetric, a negative variance, a correlation above 1; round-off of float32 is none."""
    zero, cases = (
        torch.zeros(2),
        {
            r"symmetric, got 5 at \(0, 1\) and 0 at \(1, 0\)": [[1, 5], [0, 1]],
            r"a covariance, got -1 at \(1, 1\) with variances -1 and -1": [[1, 0], [0, -1]],
            r"a covariance, got 5 at \(0, 1\) with variances 1 and 1": [[1, 5], [5, 1]],
        },
    )
    for message, rows in cases.items():
        cov = torch.tensor(rows, dtype=F64)
        with pytest.raises(ValueError, match=f"sigma must be {message}"):
            Statistics(zero, cov)
        with pytest.raises(ValueError, match=f"sigma_s must be {message}"):
            Statistics(zero, torch.eye(2), spatial_mean=zero, spatial_cov=cov)
        with pytest.raises(ValueError, match=f"cov_b must be {message}"):
            frechet_from_moments(zero, torch.eye(2), zero, cov)
    # Equal columns, a constant one and one near 0: on the border, and accepted.
    x = normal(50, 6, dtype=torch.float32) @ torch.tensor([1.0, 1, 0, 1e-5, -30, 7]).diag()
    x[:, 1] = x[:, 0]
    cov = x.T.cov() + 1e-7 * 900 * normal(6, 6, seed=1)
    assert Statistics(x.mean(0), cov).cov is cov
