"""Feature sets: from batches, from files of statistics, and what a record says of them."""

import math

import numpy as np
import pytest
import torch

from flowkit.metrics import (
    FeatureSet,
    Moments,
    Pixels,
    Statistics,
    comparison,
    feature_metrics,
    frechet_distance,
    frechet_infinity,
    frechet_unbiased,
    kernel_distance,
    neighbors,
    prdc,
)
from flowkit.provenance import tensor_hash
from tests.metrics.samples import normal


def statistics_of(x, **names):
    moments = Moments()
    moments.update(x)
    return moments.statistics(**names)


def outputs(x):
    return {"features": x[:, :4], "spatial": x[:, 4:] ** 2, "logits": 3 * x}


def test_batches_give_the_record_of_all_outputs():
    a, b = normal(80, 7), normal(90, 7, seed=1) + 0.5
    whole = [FeatureSet.collect([outputs(x)], Pixels()) for x in (a, b)]
    parts = [FeatureSet.collect(map(outputs, x.split(13)), Pixels()) for x in (a, b)]
    first, second = feature_metrics(*whole, Pixels()), feature_metrics(*parts, Pixels())
    for name, value in first.items():
        near = isinstance(value, float)
        assert second[name] == (pytest.approx(value, rel=1e-9) if near else value), name
    exact = frechet_distance(a[:, 4:] ** 2, b[:, 4:] ** 2)
    assert second["spatial_frechet_distance"] == pytest.approx(exact, rel=1e-9)
    assert second["frechet_distance"] == pytest.approx(frechet_distance(a[:, :4], b[:, :4]))
    assert second["reference"] == {"num_samples": 90, "hash": tensor_hash(b[:, :4])}
    assert (second["num_samples"], second["num_reference"]) == (80, 90)


def test_statistics_alone_leave_out_what_needs_images(tmp_path):
    """A file with the moments alone: of an unknown number of images of the population."""
    a, b = normal(120, 3), normal(400, 3, seed=1) + 1
    samples = FeatureSet.collect([outputs(normal(120, 7))], Pixels())
    np.savez(tmp_path / "a.npz", mu=normal(4), sigma=np.eye(4))
    record = feature_metrics(
        samples, FeatureSet(statistics=Statistics.load(tmp_path / "a.npz")), Pixels()
    )
    assert record["left_out"] == {
        "spatial_frechet_distance": "the reference lacks the fields mu_s, sigma_s",
        **dict.fromkeys(
            ("kernel_distance", "precision", "recall", "density", "coverage"),
            "the reference has statistics, no images or features",
        ),
    }
    assert not record["left_out"].keys() & record.keys()
    assert record["num_reference"] is None
    statistics = statistics_of(b, reference_hash="12")
    record = feature_metrics(FeatureSet(a), FeatureSet(statistics=statistics), Pixels())
    assert record["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    value, ends = frechet_unbiased(a, statistics)
    assert record["frechet_distance_unbiased"] == value
    assert record["frechet_distance_unbiased_interval"] == list(ends)
    assert record["reference"] == {"num_samples": 400, "hash": "12"}


def test_a_reference_of_adm_has_statistics_of_more_images_than_it_holds():
    a, b = normal(120, 3), normal(5000, 3, seed=1) + 1
    record = feature_metrics(FeatureSet(a), FeatureSet(b[:150], statistics_of(b)), Pixels())
    assert record["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert (record["num_reference"], record["num_reference_features"]) == (5000, 150)
    assert record["precision"] == prdc(b[:150], a).precision
    assert record["unreliable"] == []
    few = feature_metrics(FeatureSet(a), FeatureSet(b[:20], statistics_of(b)), Pixels())
    assert few["unreliable"] == ["precision", "recall", "density", "coverage"]
    # The images are many, those of the statistics are few.
    few = feature_metrics(FeatureSet(a), FeatureSet(b[:150], statistics_of(b[:20])), Pixels())
    assert few["unreliable"] == ["frechet_distance"]
    assert record["left_out"] == {}


def test_few_images_are_unreliable_and_fewer_than_features_warn_with_the_rank():
    def record(count, others, dim):
        return feature_metrics(
            FeatureSet(normal(count, dim)), FeatureSet(normal(others, dim, seed=1)), Pixels()
        )

    assert record(100, 100, 4)["unreliable"] == record(100, 100, 4)["warnings"] == []
    assert "precision" in record(100, 99, 4)["unreliable"]
    found = record(110, 120, 110)
    assert found["unreliable"] == ["frechet_distance"]
    (warning,) = found["warnings"]
    assert warning.startswith("110 samples for 110 features: the covariance has rank 109")
    assert [x.split(" for")[0] for x in record(120, 150, 200)["warnings"]] == [
        "120 samples",
        "150 reference images",
    ]


def test_references_of_other_networks_and_bad_features_are_refused():
    samples = FeatureSet(normal(30, 3))
    with pytest.raises(ValueError, match="reference must have 3 features, got 4"):
        feature_metrics(samples, FeatureSet(normal(30, 4)), Pixels())
    for names, message in (
        ({"features_name": "inception"}, "of the feature network of name pixels, got inception"),
        ({"features_hash": "12"}, f"of the feature network of hash {Pixels.hash}, got 12"),
    ):
        other = FeatureSet(statistics=statistics_of(normal(30, 3), **names))
        with pytest.raises(ValueError, match=message):
            feature_metrics(samples, other, Pixels())
    other = FeatureSet(statistics=statistics_of(normal(30, 4)))
    with pytest.raises(ValueError, match="of the 3 features of the network, got 4"):
        feature_metrics(samples, other, Pixels())
    with pytest.raises(ValueError, match="samples must have features, got statistics only"):
        feature_metrics(other, samples, Pixels())
    with pytest.raises(ValueError, match="statistics must be of the 3 features, got 4"):
        FeatureSet(normal(5, 3), other.statistics)
    with pytest.raises(ValueError, match="labels must be of the 5 features, got 4"):
        FeatureSet(normal(5, 3), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must be of the 5 features, got 6"):
        FeatureSet(normal(5, 3), logits=normal(6, 10))
    with pytest.raises(ValueError, match="features must be given without statistics, got neither"):
        FeatureSet()
    bad = [normal(6, 3), normal(6, 3)]
    bad[1][2] = math.nan
    with pytest.raises(ValueError, match=r"features must be finite, got 3 NaN .* in sample 8"):
        FeatureSet.collect([{"features": x} for x in bad], Pixels())
    with pytest.raises(ValueError, match="the number of images must be at least 2, got 0"):
        FeatureSet.collect([], Pixels())


def test_records_of_infinity_have_their_strata_and_say_which_set_is_too_small():
    a, b = normal(60, 4), normal(48, 4, seed=1)
    labels = torch.arange(60) % 5
    b = b + labels[:48, None]
    sets = FeatureSet(a + labels[:, None], labels=labels), FeatureSet(b, labels=labels[:48])
    record = feature_metrics(*sets, Pixels(), extrapolate=True)
    generator = torch.Generator().manual_seed(0)
    strata = labels, labels[:48]
    value, ends = frechet_infinity(sets[0].features, b, strata=strata, generator=generator)
    assert record["frechet_distance_infinity"] == value
    assert record["frechet_distance_infinity_interval"] == list(ends)

    def left_out(a, b):
        found = feature_metrics(a, b, Pixels(), extrapolate=True)["left_out"]
        return found["frechet_distance_infinity"]

    assert left_out(sets[0], FeatureSet(b[:47])) == "47 reference images, and it needs 48"
    two = labels.clone()
    two[2:] = 3
    assert left_out(FeatureSet(a, labels=two // 3), sets[1]) == "fewer than 3 samples of a class"
    assert left_out(FeatureSet(a[:20]), FeatureSet(b[:30])) == (
        "20 samples, and it needs 48; 30 reference images, and it needs 48"
    )


def test_precision_takes_all_images_and_kernel_distances_some(monkeypatch):
    """As ADM's evaluator does: 50 000 samples beside 10 000 images."""
    monkeypatch.setattr(comparison, "MOST_PAIRED", 50)
    monkeypatch.setattr(neighbors, "BLOCK", 1000)  # blocks of few rows
    a, b = normal(200, 3), normal(80, 3, seed=1) + 0.3
    record = feature_metrics(FeatureSet(a), FeatureSet(b), Pixels())
    assert record["paired"] == {"samples": 50, "reference": 50}
    radii = torch.cdist(b, b).sort(1).values[:, 5]
    exact = (torch.cdist(a, b) <= radii).any(1).double().mean().item()
    assert record["precision"] == exact
    radii = torch.cdist(a, a).sort(1).values[:, 5]
    assert record["recall"] == (torch.cdist(b, a) <= radii).any(1).double().mean().item()
    rows = [torch.randperm(n, generator=torch.Generator().manual_seed(0))[:50] for n in (200, 80)]
    assert record["kernel_distance"] == kernel_distance(a[rows[0]], b[rows[1]])[0]


def test_statistics_of_an_unknown_network_warn():
    a, b = normal(120, 3), normal(130, 3, seed=1)
    own = {"features_name": "pixels", "features_hash": Pixels.hash}
    for names, count in (({}, 1), (own, 0)):
        reference = FeatureSet(statistics=statistics_of(b, **names))
        warnings = feature_metrics(FeatureSet(a), reference, Pixels())["warnings"]
        assert len(warnings) == count
        assert all("do not name their feature network" in warning for warning in warnings)
