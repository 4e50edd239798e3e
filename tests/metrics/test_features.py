"""Feature networks, judges, and the records built from them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from flowkit.metrics import (
    ConvClassifier,
    Features,
    Judge,
    Pixels,
    PixelSVC,
    agreement,
    as_saved,
    c2st_interval,
    energy_distance,
    frechet_distance,
    frechet_unbiased,
    image_metrics,
    kernel_distance,
    normalized_path_energy,
    point_metrics,
    prdc,
    prdc_intervals,
    to_uint8,
    train_classifier,
    wasserstein2,
    wilson,
)
from flowkit.provenance import tensor_hash


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(*digits[:2], 10, epochs=8, name="digits")


def test_classifier_reads_held_out_digits(digits, classifier):
    _, _, images, labels = digits
    assert (classifier.predict(images) == labels).double().mean() >= 0.97
    probabilities = classifier.probabilities(images)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(images)))
    assert torch.equal(probabilities.argmax(1), classifier.predict(images))


def test_features_are_the_penultimate_layer_in_any_batch(digits, classifier):
    images = digits[0][:700]  # more than one internal batch
    features = classifier(images)
    weight, bias = list(classifier.head.parameters())
    logits = features * features.sigmoid() @ weight.T + bias  # SiLU, then a linear layer
    torch.testing.assert_close(classifier.logits(images), logits, rtol=1e-4, atol=1e-4)
    assert classifier.logits(images).shape == (700, 10)
    assert torch.allclose(classifier(images[613:614]), features[613:614], atol=1e-5)
    assert features.var(0).min() > 1e-3  # no dead dimension
    assert not features.requires_grad


def test_training_repeats_and_leaves_the_global_generator_alone(digits):
    images, labels = digits[0][:200], digits[1][:200]
    before = torch.get_rng_state()
    nets = [train_classifier(images, labels, 10, seed=s, epochs=1, width=8) for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert nets[0].hash == nets[1].hash != nets[2].hash
    assert not nets[0].training


def test_layers_and_certainty_by_hand():
    """Labels that are certain: of two classes, smoothing by .1 leaves a probability of .95."""
    labels = torch.arange(32) % 2
    images = (labels[:, None, None, None] - 0.5).expand(-1, 1, 4, 4)
    options = {"epochs": 100, "learning_rate": 0.02, "num_features": 5, "width": 4}
    net = train_classifier(images, labels, 2, **options)
    certain = net.probabilities(images)[range(32), labels]
    torch.testing.assert_close(certain, torch.full((32,), 0.95), rtol=0, atol=0.01)
    convolutions = 9 * 1 * 4 + 9 * 4 * 8  # without biases: batch norm has them
    norms, linear = 2 * (4 + 8), (8 + 1) * 5 + (5 + 1) * 2
    assert sum(p.numel() for p in net.parameters()) == convolutions + norms + linear


def test_classifier_survives_saving(digits, classifier, tmp_path):
    classifier.save(tmp_path / "net.safetensors")
    again = ConvClassifier.load(tmp_path / "net.safetensors")
    assert (again.name, again.hash) == ("digits", classifier.hash)
    assert torch.equal(again(digits[2]), classifier(digits[2]))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"file must be written by ConvClassifier\.save, got"):
        ConvClassifier.load(tmp_path / "other.safetensors")


def test_classifier_errors(digits, classifier):
    images, labels = digits[:2]
    with pytest.raises(
        ValueError, match=r"images must have shape \(B, 1, 8, 8\), got \(4, 3, 8, 8\)"
    ):
        classifier(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"labels must hold labels in \[0, 8\]"):
        train_classifier(images, labels, 9)
    with pytest.raises(ValueError, match=r"labels must have shape \(N,\) beside images"):
        train_classifier(images, labels[1:], 10)


def test_feature_networks_keep_the_protocol(classifier):
    assert isinstance(classifier, Features)
    assert isinstance(Pixels(), Features)
    x = torch.rand(3, 1, 2, 2)
    assert torch.equal(Pixels()(x), x.reshape(3, 4))


def test_judge_reads_held_out_digits_from_few_training_images(digits):
    images, labels, test_images, test_labels = digits
    judge = PixelSVC(images, labels)
    assert isinstance(judge, Judge)
    assert agreement(judge, test_images, test_labels).double().mean() >= 0.97
    small = PixelSVC(images, labels, limit=100, generator=torch.Generator().manual_seed(0))
    assert small.num_images == 100
    other, same = (torch.Generator().manual_seed(5) for _ in range(2))
    rows = torch.randperm(len(images), generator=same)[:100]
    plain = SVC(C=10).fit(images[rows].flatten(1).numpy(), labels[rows].numpy())
    drawn = PixelSVC(images, labels, limit=100, generator=other)
    expected = plain.predict(test_images.flatten(1).numpy())
    assert (drawn.predict(test_images).numpy() == expected).all()
    assert 0.6 < agreement(small, test_images, test_labels).double().mean() < 0.97
    with pytest.raises(ValueError, match=r"labels must have shape \(1437,\), got \(3,\)"):
        PixelSVC(images, labels[:3])
    with pytest.raises(ValueError, match=r"labels must have shape \(360,\), got \(3,\)"):
        agreement(judge, test_images, labels[:3])


def test_the_judge_of_wrong_labels_is_the_stated_classifier():
    """A fifth of the labels are wrong, so the border depends on ``C`` and ``gamma``."""
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.rand(60, 2, generator=generator) - 1
    wrong = torch.rand(60, generator=generator) < 0.2
    labels = ((points.sum(1) > 0) ^ wrong).long()
    places = torch.cartesian_prod(*[torch.linspace(-1, 1, 60)] * 2)
    plain = SVC(C=10, gamma="scale").fit(points.numpy(), labels.numpy())
    found = PixelSVC(points, labels).predict(places)
    assert found.tolist() == plain.predict(places.numpy()).tolist()


@pytest.fixture(scope="module")
def judge(digits):
    return PixelSVC(*digits[:2])


def record_of(digits, classifier, generated, **options):
    generator = torch.Generator().manual_seed(0)
    train, _, test, _ = digits
    return image_metrics(train, test, generated, classifier, generator=generator, **options)


def test_image_metrics_rank_models(digits, classifier):
    """Training images as 'samples' meet the floor; noise and a missing class do not."""
    train, labels, _, _ = digits
    noise = torch.randn(700, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    perfect = record_of(digits, classifier, train[:700])
    noisy = record_of(digits, classifier, (train[:700] + 0.5 * noise).clamp(-1, 1))
    missing = record_of(digits, classifier, train[labels < 5][:700])
    floor = perfect["floor"]["frechet_distance"]
    assert perfect["frechet_distance"] == pytest.approx(floor, rel=0.2)
    assert min(noisy["frechet_distance"], missing["frechet_distance"]) > 2 * floor
    low, high = perfect["frechet_distance_unbiased_interval"]
    assert low < perfect["frechet_distance_unbiased"] < high
    assert high < missing["frechet_distance_unbiased_interval"][0]
    assert missing["precision"] > 0.9
    assert missing["recall"] < 0.7 < perfect["recall"]
    assert missing["coverage"] < 0.6 < perfect["coverage"]
    assert missing["kernel_distance"] > 10 * abs(perfect["kernel_distance"])


def test_image_metrics_is_a_record(digits, classifier, judge):
    train, labels, _, test_labels = digits
    options = {"labels": labels[:200], "test_labels": test_labels, "judge": judge}
    record = record_of(digits, classifier, train[:200], **options)
    assert json.loads(json.dumps(record)) == record
    assert record == record_of(digits, classifier, train[:200], **options)
    assert record["num_samples"] == record["floor"]["num_samples"] == 200
    assert record["features"] == {"name": "digits", "hash": classifier.hash}
    assert record["reference"]["num_samples"] == 360
    for share, interval, count in (
        (record["class_agreement"], record["class_agreement_interval"], 200),
        (record["judge"]["test_accuracy"], record["judge"]["test_accuracy_interval"], 360),
    ):
        assert share >= 0.97
        assert interval == list(wilson(share, count))
    wrong = record_of(digits, classifier, train[:200], **options | {"labels": 9 - labels[:200]})
    assert wrong["class_agreement"] < 0.1
    assert "fid" not in json.dumps(record).lower()


def test_image_metrics_jackknife_within_the_classes(digits, classifier):
    """The training digits as samples: equal to the test digits, in fixed numbers per class."""
    train, labels, test, test_labels = digits
    record = record_of(digits, classifier, train, labels=labels, test_labels=test_labels)
    assert record["stratified"] == {"samples": True, "reference": True}
    assert record["floor"]["stratified"] == {"samples": False, "reference": True}
    a, b = (classifier(as_saved(images)) for images in (train, test))
    value, interval = frechet_unbiased(a, b, strata=(labels, test_labels))
    assert record["frechet_distance_unbiased"] == value
    assert record["frechet_distance_unbiased_interval"] == list(interval)
    value, interval = kernel_distance(a, b, strata=(labels, test_labels))
    assert (record["kernel_distance"], record["kernel_distance_interval"]) == (
        value,
        list(interval),
    )
    _, intervals = prdc_intervals(b, a, 5, strata=(test_labels, labels))
    for name in ("precision", "recall", "density", "coverage"):
        assert record[f"{name}_interval"] == list(intervals[name])
    # A class of one image, and no classes: draws that count as independent.
    labels = labels.clone()
    labels[0] = 10
    record = record_of(digits, classifier, train, labels=labels)
    assert record["stratified"] == {"samples": False, "reference": False}
    assert record["frechet_distance_unbiased"] == frechet_unbiased(a, b)[0]


def test_image_metrics_measures_images_as_saved(digits):
    """A tenth of a gray level, and what sticks out of the range, are lost in a file."""
    train, test = digits[0][:100], digits[2]
    exact = to_uint8(train).float() / 127.5 - 1
    blurred = exact + 0.1 / 127.5
    blurred[exact == 1] = 1.7
    values = [image_metrics(train, test, x, Pixels())["frechet_distance"] for x in (exact, blurred)]
    reference = to_uint8(test).float() / 127.5 - 1
    assert values[0] == values[1] == frechet_distance(exact.flatten(1), reference.flatten(1))


def test_image_metrics_of_few_samples_claims_no_interval(digits, classifier):
    train = digits[0]
    record = record_of(digits, classifier, train[:4])
    assert record["frechet_distance_unbiased"] is None
    assert record["frechet_distance_unbiased_interval"] is None
    assert record["precision_interval"] is None
    assert record["neighbors"] == 1
    # More samples than training images: the floor says how many it has.
    many = image_metrics(train[:50], digits[2], train[:200], Pixels())
    assert (many["num_samples"], many["floor"]["num_samples"]) == (200, 50)


def test_twenty_images_and_two_of_a_class_are_enough_for_intervals(digits):
    """Halves hold ten images, twice the five neighbors; a jackknife within a class needs two."""
    train, _, test, _ = digits
    pairs = torch.arange(20) // 2
    for count in (19, 20):
        record = image_metrics(train, test, train[:count], Pixels(), labels=pairs[:count])
        assert (record["precision_interval"] is None) == (count == 19)
        assert record["stratified"]["samples"] == (count == 20)
    value, interval = kernel_distance(
        *(as_saved(images).flatten(1) for images in (train[:20], test)), strata=(pairs, None)
    )
    assert record["kernel_distance"] == pytest.approx(value, rel=1e-12)
    assert record["kernel_distance_interval"] == pytest.approx(interval, rel=1e-12)


def test_values_of_few_images_are_marked_and_noise_among_six_is_not_precise():
    """Six gray images, and samples far off: the fifth nearest neighbor of each is as far."""
    gray = torch.linspace(-1, 1, 6)[:, None, None, None].expand(-1, 1, 1, 2)
    far = torch.tensor([1.0, -1.0]).expand(8, 1, 1, 2)
    assert image_metrics(gray, gray, far, Pixels())["precision"] == 0
    assert prdc(gray.flatten(1), far.flatten(1), 5).precision == 1
    images = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert image_metrics(images, images, images, Pixels())["unreliable"] == []
    for test, made in ((images[1:], images), (images, images[1:])):
        record = image_metrics(images, test, made, Pixels())
        marked = ["frechet_distance", "precision", "recall", "density", "coverage"]
        assert record["unreliable"] == marked
    assert record["floor"]["unreliable"] == marked


def test_image_metrics_errors(digits, classifier, judge):
    train = digits[0]
    for few, name in enumerate(("real_train", "real_test", "generated")):
        sets = [train[: 3 if k == few else 4] for k in range(3)]
        with pytest.raises(ValueError, match=f"^the number of {name} images must be at least 4"):
            image_metrics(*sets, Pixels())
    with pytest.raises(ValueError, match="labels must be given with a judge, got None"):
        record_of(digits, classifier, train[:9], judge=judge)
    with pytest.raises(ValueError, match="labels must be given with a judge, got None"):
        record_of(digits, classifier, train[:9], judge=judge, labels=digits[1][:9])


def test_point_metrics_tells_missing_the_data_from_being_straight():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    real = source + torch.tensor([3.0, 0.0])
    straight = point_metrics(real, real, torch.stack([source, real]), 1)
    assert straight["w2"] == pytest.approx(0, abs=1e-9)
    assert straight["transport_w2_squared"] == pytest.approx(9)
    assert straight["path_energy"] == pytest.approx(9)
    assert straight["normalized_path_energy"] == pytest.approx(0, abs=1e-9)
    # Half the way: less energy than W2², since the data is missed.
    short = source + torch.tensor([1.5, 0.0])
    record = point_metrics(real, short, torch.stack([source, short]), 1)
    assert record["path_energy_below_w2_squared"] is True
    assert (record["w2"], record["w2_squared"]) == pytest.approx((1.5, 2.25))
    assert record["normalized_path_energy"] == pytest.approx(0.75)
    assert json.loads(json.dumps(record)) == record


def test_point_metrics_have_the_floor_of_two_real_sets():
    real, made, train = torch.randn(3, 80, 2, generator=torch.Generator().manual_seed(0))
    record = point_metrics(real, made[:60] + 2, train=train)
    assert record["floor"]["w2"] == wasserstein2(train[:60], real)
    assert record["w2"] > 3 * record["floor"]["w2"]
    value, ends = energy_distance(made[:60] + 2, real)
    assert record["energy_distance"] == value
    assert record["energy_distance_interval"] == list(ends)
    value, ends = c2st_interval(made[:60] + 2, real)
    assert (record["c2st"], record["c2st_interval"]) == (value, list(ends))
    low, high = record["floor"]["c2st_interval"]
    assert low < 0.5 < high < record["c2st_interval"][0]
    assert (record["floor"]["num_samples"], record["num_reference"]) == (60, 80)
    assert json.loads(json.dumps(record)) == record
    few = point_metrics(real, made[:19])
    assert few["c2st"] is few["c2st_interval"] is None
    assert "floor" not in few


def test_point_metrics_takes_unequal_counts_and_asks_for_a_grid():
    a, b = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(0))
    record = point_metrics(a, b[:30])
    assert record["w2"] == wasserstein2(b[:30], a)
    assert record["num_samples"] == 30
    assert record["reference"] == {"num_samples": 40, "hash": tensor_hash(a)}
    assert "path_energy" not in record
    path = torch.stack([a, b])
    full = point_metrics(a + 1, b, path, 1)
    expected = normalized_path_energy(full["path_energy"], wasserstein2(a, a + 1))
    assert full["normalized_path_energy"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="grid must be given with a path, got None"):
        point_metrics(a, b, path)
