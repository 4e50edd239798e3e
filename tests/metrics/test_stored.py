"""Features on disk: computed once for a network and for images that are the same when saved."""

from pathlib import Path

import torch

from flowkit.metrics import Pixels, StoredFeatures


class Counted(Pixels):
    """Twice the pixels, and the number of calls."""

    def __init__(self, name="counted", hash="0"):
        self.name, self.hash, self.calls = name, hash, 0

    def __call__(self, images):
        self.calls += 1
        return 2 * super().__call__(images)


def test_features_are_computed_once_for_a_network_and_saved_images(tmp_path):
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 1.8 - 0.9
    images = (127.5 * images).round() / 127.5 + 1 / 255  # gray levels, exactly
    folder = tmp_path / "new" / "cache"
    network = Counted()
    stored = StoredFeatures(network, str(folder))
    assert (stored.name, stored.hash, stored.folder) == ("counted", "0", Path(folder))
    first = stored(images)
    assert torch.equal(first, 2 * images.flatten(1))
    again = StoredFeatures(network, folder)
    assert torch.equal(again(images), first)
    assert torch.equal(again(images + 0.2 / 127.5), first)  # the same file of a picture
    assert network.calls == 1
    assert torch.equal(stored(images + 1 / 127.5), 2 * (images + 1 / 127.5).flatten(1))
    assert network.calls == 2
    for other in (Counted(name="other"), Counted(hash="1")):
        StoredFeatures(other, folder)(images)
        assert other.calls == 1
    assert len({path.name for path in folder.glob("features-*.safetensors")}) == 4
