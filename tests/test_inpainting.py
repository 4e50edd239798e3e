"""Holes, the condition that shows what lies around them, and known pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit import inpainting
from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.inpainting import RandomMasks, inpainting_cond, paste_back
from flowkit.nn import autoencoder_kl

KINDS = ("boxes", "strokes", "mixed")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    most=st.integers(1, 4),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    seed=st.integers(0, 10_000),
)
def test_every_mask_has_a_hole_and_is_that_of_its_seed(kind, most, size, seed):
    masks = RandomMasks(kind, most)(8, size, seeded(seed))
    assert masks.shape == (8, 1, *size)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.flatten(1).sum(1) > 0).all()
    assert torch.equal(masks, RandomMasks(kind, most)(8, size, seeded(seed)))


def test_one_box_is_a_box_of_the_stated_sides():
    masks = RandomMasks("boxes", most=1)(500, (32, 48), seeded())[:, 0] > 0
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height, width = (int(v[-1] - v[0]) + 1 for v in (rows, columns))
        assert mask.sum() == height * width
        assert 4 - 1 <= height <= 16 + 1
        assert 6 - 1 <= width <= 24 + 1
    # all of the image is reached, but for its corners
    reached = masks.any(0)
    assert reached.any(0).all()
    assert reached.any(1).all()
    assert reached[8:-8, 12:-12].all()


def test_strokes_are_broken_lines_of_the_stated_width():
    masks = RandomMasks("strokes", most=1)(300, (64, 64), seeded())[:, 0] > 0
    area = masks.flatten(1).float().mean(1)
    # at most 5 pieces of 0.3, 0.16 wide, with round ends
    assert area.max() < 5 * 0.3 * 0.16 + torch.pi * 0.08**2
    assert area.min() > torch.pi * 0.03**2 / 4, "a stroke from a corner keeps a quarter disk"
    boxes = [(m.any(1).sum() * m.any(0).sum()).item() for m in masks]
    filled = masks.flatten(1).sum(1) / torch.tensor(boxes)
    assert (filled < 0.6).float().mean() > 0.5, "irregular, unlike boxes"


def test_width_of_a_stroke_by_brute_force():
    """Every hole pixel lies near the stroke: erosion by its largest half width leaves nothing."""
    masks = RandomMasks("strokes", most=1)(50, (64, 64), seeded(1))
    reach = 7  # pixels: more than 0.16 · 64 / 2 from the middle
    window = torch.nn.functional.max_pool2d(1 - masks, 2 * reach + 1, 1, reach)
    crossing = masks * (1 - window)  # far from any known pixel: only where pieces overlap
    assert crossing.sum() < 0.02 * masks.sum()


@pytest.mark.parametrize("kind", ["boxes", "strokes"])
def test_the_number_of_holes_is_uniform_up_to_the_most(monkeypatch, kind):
    """Without drawing them: the k-th is used in (most − k) of most masks."""
    drawn = []
    original = inpainting._Draw.__init__
    monkeypatch.setattr(
        inpainting._Draw,
        "__init__",
        lambda self, *args: (original(self, *args), drawn.append(self.used))[0],
    )
    RandomMasks(kind, 3)(6000, (4, 4), seeded())
    share = drawn[0].float().mean(0)
    torch.testing.assert_close(share, torch.tensor([1, 2 / 3, 1 / 3]), rtol=0, atol=0.02)


def test_the_distance_to_a_line_is_that_of_its_nearest_point():
    """By brute force over points of the line, for slanted lines too."""
    y, x = torch.rand(2, 50, 1, 1, 1, generator=seeded(1))
    start, end = torch.rand(2, 2, 50, 1, 1, 1, generator=seeded(2))
    found = inpainting._distance_to_piece(y, x, tuple(start), tuple(end))
    s = torch.linspace(0, 1, 2001)
    points = start + s * (end - start)
    expected = torch.hypot(y - points[0], x - points[1]).amin(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_strokes_are_as_wide_as_stated_on_wide_images_too():
    """Widths are shares of the smaller side. On a wide image, the edges cut off a little less."""
    square, wide = (
        RandomMasks("strokes", 1)(1500, size, seeded()).flatten(1).sum(1).mean()
        for size in ((32, 32), (32, 96))
    )
    assert 1.15 < wide / square < 1.25


def test_mixed_masks_are_half_boxes():
    boxes, mixed = (RandomMasks(kind, 1)(2000, (16, 16), seeded()) for kind in ("boxes", "mixed"))
    assert not torch.equal(boxes, mixed)

    def is_box(masks):
        rows, columns = (masks.any(d).sum(-1) for d in (2, 1))
        return masks.flatten(1).sum(1) == rows * columns

    share = is_box(mixed[:, 0] > 0).float().mean()
    strokes = is_box(RandomMasks("strokes", 1)(2000, (16, 16), seeded())[:, 0] > 0).float().mean()
    assert is_box(boxes[:, 0] > 0).all()
    assert share.item() == pytest.approx(0.5 + 0.5 * strokes.item(), abs=0.04)


def test_condition_has_a_gray_hole_and_a_signed_mask():
    images, mask = torch.rand(3, 2, 8, 8) + 0.1, RandomMasks()(3, (8, 8), seeded())
    cond = inpainting_cond(Identity(), images, mask)
    assert torch.equal(cond["masked"], images * (1 - mask))
    assert torch.equal(cond["mask"], 2 * mask - 1)
    hidden = torch.where(mask > 0, torch.nan, images)
    assert torch.equal(inpainting_cond(Identity(), hidden, mask)["masked"], cond["masked"])


def tiny_autoencoder(image, multipliers):
    return KLAutoencoder(autoencoder_kl(image, width=8, multipliers=multipliers))


def test_condition_on_latents_is_scaled_and_a_cell_is_a_hole_if_a_pixel_is():
    autoencoder = tiny_autoencoder((1, 8, 8), (1, 2))
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    autoencoder.fit_scale(images)
    mask = RandomMasks()(4, (8, 8), seeded())
    cond = inpainting_cond(autoencoder, images, mask)
    raw = autoencoder.vae.encode(images * (1 - mask)).latent_dist.mean
    torch.testing.assert_close(cond["masked"], (raw - autoencoder.mean) / autoencoder.std)
    touched = mask.unflatten(3, (4, 2)).unflatten(2, (4, 2)).amax((3, 5))
    assert torch.equal(cond["mask"], 2 * touched - 1)
    published = inpainting_cond(autoencoder, images, mask, "nearest")
    assert torch.equal(published["mask"], 2 * mask[..., ::2, ::2] - 1)
    assert (touched > mask[..., ::2, ::2]).any(), "both ways differ here"
    with pytest.raises(ValueError, match="resize must be one of max, nearest, got 'mean'"):
        inpainting_cond(autoencoder, images, mask, "mean")


@pytest.mark.parametrize(("side", "levels", "least"), [(64, 4, 0.3), (30, 3, 0.25)])
def test_no_pixel_of_a_hole_is_told_to_be_known(side, levels, least):
    """Of the nearest pixels' masks, a third of the hole's pixels are (.36 of 1000 at 64 pixels)."""
    autoencoder, factor = tiny_autoencoder((1, side, side), (1,) * levels), 2 ** (levels - 1)
    mask = RandomMasks()(64, (side, side), seeded())
    told = {}
    for resize in ("max", "nearest"):
        cells = inpainting_cond(autoencoder, mask, mask, resize)["mask"]
        pixels = cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        told[resize] = (pixels[..., :side, :side] < 0)[mask > 0].float().mean().item()
    assert told["max"] == 0
    assert told["nearest"] > least


def test_condition_of_a_padded_image_keeps_its_place():
    """7 columns become 8: the mask is padded like the image, not stretched."""
    autoencoder = KLAutoencoder(autoencoder_kl((1, 7, 7), width=8, multipliers=(1, 1, 1)))
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 4:, :4] = 1
    for resize in ("max", "nearest"):
        cond = inpainting_cond(autoencoder, torch.zeros(1, 1, 7, 7), mask, resize)
        assert cond["mask"][0, 0].tolist() == [[-1, -1], [1, -1]]
    mask[..., 3:, :4] = 1  # one row more touches the cells above
    cond = inpainting_cond(autoencoder, torch.zeros(1, 1, 7, 7), mask)
    assert cond["mask"][0, 0].tolist() == [[1, -1], [1, -1]]


def test_known_pixels_are_exact():
    images, samples = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = RandomMasks()(2, (8, 8), seeded())
    pasted = paste_back(samples, images, mask)
    known = mask.expand_as(images) == 0
    assert torch.equal(pasted[known], images[known])
    assert torch.equal(pasted[~known], samples[~known])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 1, 4, 4), r"mask must have shape \(2, 1, 8, 8\), got \(2, 1, 4, 4\)"),
        (torch.zeros(2, 8, 8), r"mask must have shape \(2, 1, 8, 8\), got \(2, 8, 8\)"),
        (
            torch.eye(8).expand(2, 1, 8, 8) / 2,
            r"mask must hold 0 \(known\) and 1 \(hole\) alone, got values in \[0.0, 0.5\]",
        ),
        (
            torch.full((2, 1, 8, 8), -1.0),
            r"mask must hold 0 \(known\) and 1 \(hole\) alone, got values in \[-1.0, -1.0\]",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        inpainting_cond(Identity(), torch.zeros(2, 1, 8, 8), mask)
    with pytest.raises(ValueError, match=message):
        paste_back(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), mask)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of boxes, mixed, strokes, got 'blobs'"):
        RandomMasks("blobs")
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        RandomMasks(most=0)
