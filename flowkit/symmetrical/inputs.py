"""Checks of the arguments of a joint flow of images and labels."""

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from flowkit.sampling import ODESampler
from flowkit.symmetrical.codecs import Codec
from flowkit.types import Batch


def check_labeled(batch: Batch) -> Tensor:
    """Return the labels of a batch: classes ``(B,)``, or masks ``(B, H, W)`` of the images' size.

    Masks of cached latents may be of any size here. `check_sizes` then compares the latents of the
    masks with the latents of the images.

    Raises:
        TypeError: If ``cond`` is not a tensor.
        ValueError: If the labels do not fit the images, or the batch holds segments of a flow.
    """
    labels, images = batch.get("cond"), batch["x1"]
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"cond must be a tensor of labels, got {type(labels).__name__}; give images with "
            "classes or masks"
        )
    cached = "encoded_by" in batch  # latents, smaller than the masks of their images
    masks = (len(images), *(labels.shape[1:] if cached and labels.ndim == 3 else images.shape[2:]))
    if labels.shape not in ((len(images),), masks):
        raise ValueError(
            "cond must hold a label per image or masks of the images' size "
            f"{tuple(images.shape[2:])}, got shape {tuple(labels.shape)}"
        )
    if "t0" in batch or "t1" in batch:
        raise ValueError("batch must hold whole pairs for a joint flow, got segments (t0, t1)")
    return labels


def checked_class_weights(weights: Sequence[float] | None, num_classes: int) -> list[float] | None:
    """Return the weights of classes as floats; None stays None.

    Raises:
        ValueError: If there is not one weight per class, if a weight is negative or not finite, or
            if all weights are 0.
    """
    if weights is None:
        return None
    if len(weights) != num_classes:
        raise ValueError(
            f"class_weights must hold {num_classes} weights, one per class, got {len(weights)}"
        )
    numbers = [float(w) for w in weights]
    if not (all(0 <= w < math.inf for w in numbers) and any(numbers)):
        raise ValueError(f"class_weights must be finite, at least 0 and not all 0, got {numbers}")
    return numbers


def checked_scale(guidance: object, label_dropout: float) -> float:
    """Return the scale of guidance as a float; None becomes 1, a scale without guidance.

    Raises:
        TypeError: If ``guidance`` is not a number.
        ValueError: If it is not finite. If it is not 1 although the model, with
            ``label_dropout = 0``, never trained without its labels.
    """
    if guidance is None:
        return 1.0
    if not isinstance(guidance, int | float):
        got = "a function" if callable(guidance) else repr(guidance)
        raise TypeError(f"guidance must be a number here, got {got}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance != 1 and label_dropout == 0:
        raise ValueError(
            "guidance must be null or 1 for a model that never trained without its labels, "
            f"got {guidance}; train it with module.label_dropout=0.1"
        )
    return float(guidance)


def check_no_zero_code(codec: Codec) -> None:
    """Require a codec that encodes no class as zeros.

    With one time, zeros stand for a missing label. (With two times, ``s = 1`` does.)

    Raises:
        ValueError: If the code of a class is zeros.
    """
    table = getattr(codec, "table", None)
    if table is not None and bool((zeros := (table == 0).all(1)).any()):
        raise ValueError(
            "label_dropout must be 0 in symmetric mode for a codec with zeros as a code, since "
            f"zeros stand for a missing label, got class {int(zeros.nonzero()[0])} of {codec}"
        )


def count_of(labels: Tensor) -> int:
    """Return the number ``B`` of samples of labels ``(B,)`` or ``(B, H, W)``.

    Raises:
        TypeError: If ``labels`` is not a tensor with at least one dimension.
    """
    if not (isinstance(labels, Tensor) and labels.ndim):
        raise TypeError(f"labels must be a tensor (B,) or (B, H, W), got {labels!r}")
    return len(labels)


def check_sizes(
    y0: Tensor, x1: Tensor, labels: Tensor, known: tuple[int, ...] | None = None
) -> None:
    """Require states of labels that fit the earlier ones and the states of images.

    Args:
        y0: States of labels, ``(B, K)`` or ``(B, K, h, w)``.
        x1: States of images, ``(B, C, h, w)``.
        labels: The labels, for the error.
        known: Shape of one state of a label in earlier batches; None for the first batch.

    Raises:
        ValueError: If the states of labels have another shape than before, or those of masks
            another height or width than the states of images.
    """
    if known not in (None, tuple(y0.shape[1:])):
        raise ValueError(
            f"cond must be labels whose states have shape {known} as before, got "
            f"{tuple(y0.shape[1:])} of labels {tuple(labels.shape)}"
        )
    if y0.ndim > 2 and y0.shape[2:] != x1.shape[2:]:
        raise ValueError(
            f"cond must be masks whose states have the latents' size {tuple(x1.shape[2:])}, "
            f"got {tuple(y0.shape[2:])} of masks {tuple(labels.shape)}"
        )


def check_region(region: Tensor, images: Tensor) -> None:
    """Require a region ``(B, H, W)``, one value for every pixel of images ``(B, C, H, W)``.

    Raises:
        ValueError: If ``region`` is not a tensor of this shape.
    """
    expected = (len(images), *images.shape[2:])
    if not isinstance(region, Tensor) or region.shape != expected:
        got = tuple(region.shape) if isinstance(region, Tensor) else repr(region)
        raise ValueError(f"region must have shape {expected}, one value per pixel, got {got}")


def warn_of_more_steps(sampler: ODESampler) -> None:
    """Warn that labels of a flow of one time are exact only in one Euler step.

    Warns:
        UserWarning: If the sampler has more steps or another method.
    """
    if len(sampler.times) > 2 or sampler.method != "euler":
        warnings.warn(
            "labels in several steps of symmetric mode may be worse than in one Euler step, which "
            "returns their exact expectation; use ODESampler(1), or times='two-time'",
            stacklevel=4,
        )
