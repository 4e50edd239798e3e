"""Symmetrical flow matching: one network for generation, classification and segmentation."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit import checks
from flowkit.autoencoders import Autoencoder, Identity
from flowkit.guidance import ClassifierFree
from flowkit.modules.flow import (
    ADAMW,
    FlowModule,
    Guidance,
    MakeOptimizer,
    MakeScheduler,
    Seeds,
    evaluating,
    known_shape,
    seeds_of,
    seeds_or_drawn,
)
from flowkit.sampling import ODESampler, Solution, seeded_noise
from flowkit.sampling.ode import Callback
from flowkit.symmetrical import (
    Classification,
    Codec,
    JointFlow,
    LabeledImages,
    LabelStates,
    Segmentation,
)
from flowkit.symmetrical.inputs import (
    check_labeled,
    check_no_zero_code,
    check_region,
    check_sizes,
    checked_class_weights,
    checked_scale,
    count_of,
    warn_of_more_steps,
)
from flowkit.symmetrical.joint import ImageVelocity
from flowkit.symmetrical.label_states import label_noise
from flowkit.symmetrical.regions import put_back
from flowkit.types import Batch, Cond, to_device
from flowkit.velocity import Velocity

Sampler = ODESampler | None


class SymmetricalFlowMatching(FlowModule):
    """Train one network on the flow of images and the opposite flow of their labels.

    ``loss = w ‖v̂_x − v_x‖² + (1 − w) ‖v̂_y − v_y‖²``. Each norm is a mean over its own elements.
    See `flowkit.symmetrical.joint` for states, times and velocities.

    ``times="symmetric"`` is the published method: image and label share one time and always move
    together. One step from ``t = 1`` returns exactly ``E[y₀ | x₁]``; with one-hot codes this is
    the vector of class probabilities. With more steps, labels *do not converge to the right
    conditional*, and images do not with any number of steps. The reason: the two ends of the joint
    flow are independent, and nothing ties the map between them to the joint law of the data.

    ``times="two-time"`` repairs this: the times ``(t, s)`` cover the square. A moving image with a
    clean label samples ``p(x | y)``. A moving label with a clean image samples ``p(y | x)``. Image
    and label that both move from noise to data give pairs. `guided` is then an ordinary velocity
    of images given labels.

    The label ``codec.num_classes`` (in every pixel of a mask) stands for no label.

    Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634). The two-time mode,
    one-hot codes, the one-step posterior, label dropout and guidance are additions of flowkit.

    Args:
        velocity: Network on states ``(B, C + codec.channels, *)``, called as
            ``velocity(state, t)``. For two times, build the network with ``num_times=2``.
        codec: Converts labels, classes ``(B,)`` or masks ``(B, H, W)``, to codes and back.
        times: ``"two-time"`` or ``"symmetric"``.
        image_weight: ``w`` in [0, 1].
        boundary_share: Share in [0, 1] of two-time training pairs with one clean side.
        label_dropout: Probability in [0, 1] that training hides a label. Guidance and images
            without labels need a positive probability.
        class_weights: One weight per class, for the label loss of its images or pixels. The model's
            probabilities become the probabilities of data in which each class is more frequent by
            its weight.
        autoencoder: Maps images, and masks coded as images, to states of the flow. Masks, and
            images to label, become means of the autoencoder's posterior, not draws from it.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    >>> from flowkit.symmetrical.codecs import OneHot
    >>> from flowkit.nn import ResidualMLP
    >>> net = ResidualMLP((1 + 3, 8, 8), num_times=2)
    >>> module = SymmetricalFlowMatching(net, OneHot(3))
    >>> images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    >>> module.loss({"x1": images, "cond": labels}).keys()
    dict_keys(['loss', 'image_loss', 'label_loss'])
    >>> probabilities, uncertainty = module.classify(images)
    >>> module.generate(labels).shape, probabilities.shape, uncertainty.shape
    (torch.Size([6, 1, 8, 8]), torch.Size([6, 3]), torch.Size([6]))
    """

    label_shape: tuple[int, ...] | None = None
    """Shape of the state of one label, taken from the first batch passed to `loss`."""

    @checks.renamed_arguments(since="0.2.0", removed_in="0.4.0", edges="boundary_share")
    def __init__(
        self,
        velocity: Velocity,
        codec: Codec,
        times: Literal["two-time", "symmetric"] = "two-time",
        image_weight: float = 0.5,
        boundary_share: float = 0.5,
        label_dropout: float = 0.0,
        class_weights: Sequence[float] | None = None,
        autoencoder: Autoencoder = Identity(),
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(velocity, autoencoder, None, optimizer, lr_scheduler)
        checks.check_choice(times, ("two-time", "symmetric"), "times")
        checks.check_between(image_weight, 0, 1, "image_weight")
        checks.check_between(boundary_share, 0, 1, "boundary_share")
        checks.check_between(label_dropout, 0, 1, "label_dropout")
        self.codec, self.times, self.boundary_share = codec, times, boundary_share
        self.image_weight, self.label_dropout = image_weight, label_dropout
        self.class_weights = checked_class_weights(class_weights, self.states.codec.num_classes)
        if times == "symmetric" and label_dropout > 0:
            check_no_zero_code(codec)

    @property
    def joint(self) -> JointFlow:
        """The network as a pair of velocities, of images and of labels."""
        return JointFlow(self.velocity, self.times == "two-time")

    @property
    def states(self) -> LabelStates:
        """The conversion of labels to states of the flow and back."""
        return LabelStates(self.codec, self.autoencoder)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the weighted ``loss`` of a batch, its ``image_loss`` and its ``label_loss``.

        Raises:
            TypeError: If the batch has no labels.
            ValueError: If the codec has no such labels, or if masks and images differ in size.
        """
        labels = check_labeled(batch)
        x1 = self.encode(batch, generator)["x1"]
        y0 = self.states.encode(labels, dequantize=True, generator=generator).to(x1)
        check_sizes(y0, x1, labels, self.label_shape)
        self.label_shape = tuple(y0.shape[1:])
        image_loss, label_loss = self.joint.loss(
            x1,
            y0,
            x0=batch.get("x0"),
            mask=batch.get("mask"),
            label_weight=self.states.weight(labels, y0, self.class_weights),
            boundary_share=self.boundary_share,
            label_dropout=self.label_dropout if self.training else 0.0,
            generator=generator,
        )
        loss = self.image_weight * image_loss + (1 - self.image_weight) * label_loss
        return {"loss": loss, "image_loss": image_loss, "label_loss": label_loss}

    def generate(
        self,
        labels: Tensor,
        sampler: Sampler = None,
        seeds: Seeds = None,
        guidance: Guidance = None,
    ) -> Tensor:
        """Draw an image ``(B, C, *)`` for each label or mask; see `sample`."""
        return self.sample(count_of(labels), sampler, labels, seeds, guidance)

    def solve(
        self,
        x0: Tensor,
        sampler: Sampler = None,
        cond: Cond | Sequence[str | int] = None,
        guidance: Guidance = None,
        *,
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Carry noise ``x0 (B, C, *)`` to images (or latents) of the labels ``cond``.

        A callback sees the images, and in symmetric mode also their labels behind, on dimension 1.

        Raises:
            TypeError: If ``cond`` is not a tensor.
            ValueError: If the codec has no such labels, or their number is wrong.
        """
        sampler, x0 = sampler or self.default_sampler, self.as_state(x0)
        cond = self.as_cond(cond)
        if isinstance(cond, Tensor) and len(cond) != len(x0):
            raise ValueError(f"cond must hold one label per sample, {len(x0)}, got {len(cond)}")
        options: dict[str, Any] = {"return_path": return_path, "callback": callback}
        with evaluating(self):
            if self.joint.two_times:
                return sampler.solve(self.guided(guidance), x0, cond, **options)
            y, hidden = self._condition(cond)
            y, known = y.expand(len(x0), *y.shape[1:]), ~hidden.expand(len(x0))
            scale = checked_scale(guidance, self.label_dropout)
            return self.joint.solve_images(sampler, x0, y, known, scale, **options)

    def guided(self, guidance: Guidance) -> Velocity:
        """Return the velocity of images given labels, under guidance, in two-time mode.

        In symmetric mode labels move with the images, so only `solve` is possible.
        """
        velocity = ImageVelocity(self.joint, self._condition)
        if callable(guidance):
            return guidance(velocity)
        scale = checked_scale(guidance, self.label_dropout)
        return velocity if scale == 1 else ClassifierFree(velocity, scale, self.codec.num_classes)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity of images ``x (B, C, *)`` at ``t (B,)``; see `guided`."""
        return self.guided(None)(x, t, cond)

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        labels: Tensor,
        region: Tensor,
        sampler: Sampler = None,
        seeds: Seeds = None,
        guidance: Guidance = None,
    ) -> Tensor:
        """Draw a region of images anew under changed labels, and keep the rest.

        After every step the pixels outside the region are put back on the straight path from their
        noise to the given image. At the end these pixels are exactly as given; in a latent flow,
        up to the error of the autoencoder. The method is a projection and not a draw given the
        kept pixels, so the new pixels may fit the kept pixels imperfectly.

        Args:
            images: Images ``(B, C, H, W)``.
            labels: The changed masks ``(B, H, W)`` or classes ``(B,)``.
            region: Pixels that may change, ``(B, H, W)``, for example ``labels != old_labels``. In
                a latent flow, a latent cell that the region touches changes as a whole.
            sampler: As for `sample`.
            seeds: As for `sample`.
            guidance: As for `sample`.

        Raises:
            TypeError: If images or labels are not tensors of the right kind.
            ValueError: If the region, the labels or the times of the sampler do not fit.
        """
        check_region(region, images)
        if sampler is not None:
            checks.check_whole(sampler.times)
        x1 = self._latents(images)
        x0 = self.as_state(seeded_noise(x1.shape[1:], seeds_or_drawn(seeds, len(images))))
        keep = put_back(x0, x1, region.to(self.device))
        return self.autoencoder.decode(self.solve(x0, sampler, labels, guidance, callback=keep).x)

    @torch.no_grad()
    def sample_pairs(
        self, num_samples: int, sampler: Sampler = None, seeds: Seeds = None
    ) -> LabeledImages:
        """Draw images and their labels together, both from noise; only in two-time mode.

        The sampler (25 Heun steps by default) and the seeds are as for `sample`.

        Raises:
            RuntimeError: If the module is in symmetric mode.
            ValueError: If ``num_samples`` is below 1, or if the sampler does not go from 0 to 1.
        """
        checks.check_at_least(num_samples, 1, "num_samples")
        if not self.joint.two_times:
            raise RuntimeError(
                "times must be 'two-time' to sample pairs, got 'symmetric'; give labels to generate"
            )
        sampler = sampler or self.default_sampler
        checks.check_whole(sampler.times)
        seeds = seeds_or_drawn(seeds, num_samples)
        x = self.as_state(seeded_noise(known_shape(self.sample_shape), seeds))
        y = self.as_state(label_noise(known_shape(self.label_shape), seeds)[:, 0])
        with evaluating(self):
            x, y = self.joint.solve_pairs(sampler, x, y)
        return LabeledImages(self.autoencoder.decode(x), self.states.labels(y))

    def classify(
        self, images: Tensor, sampler: Sampler = None, draws: int = 1, seeds: Seeds = None
    ) -> Classification:
        """Return class probabilities ``(B, K)`` and uncertainties ``(B,)``; see `posterior`.

        Raises:
            RuntimeError: If the labels are masks.
        """
        if len(known_shape(self.label_shape)) != 1:
            raise RuntimeError("labels must be classes to classify, got masks; use segment")
        probabilities = self.posterior(images, sampler, draws=draws, seeds=seeds)
        return Classification(probabilities, 1 - probabilities.amax(1))

    def segment(
        self, images: Tensor, sampler: Sampler = None, draws: int = 1, seeds: Seeds = None
    ) -> Segmentation:
        """Return the most probable label of each pixel ``(B, H, W)``, and its probability.

        Raises:
            RuntimeError: If the labels are classes of images.
        """
        if len(known_shape(self.label_shape)) == 1:
            raise RuntimeError("labels must be masks to segment, got classes; use classify")
        confidence, mask = self.posterior(images, sampler, draws=draws, seeds=seeds).max(1)
        return Segmentation(mask, confidence)

    @torch.no_grad()
    def posterior(
        self, images: Tensor, sampler: Sampler = None, draws: int = 1, seeds: Seeds = None
    ) -> Tensor:
        """Return probabilities ``(B, K, *)`` of labels, averaged over draws of the labels' noise.

        One step gives the expected code given the image, for any noise. In two-time mode several
        steps give a sample of the label, so that probabilities need many draws. In symmetric mode
        several steps give neither an expectation nor a sample.

        Args:
            images: Images ``(B, C, *)``.
            sampler: The solver; one Euler step by default.
            draws: Number of noises per image, at least 1. Each draw costs a solve.
            seeds: One seed per image; 0, 1, ... by default, so that results repeat.

        Raises:
            TypeError: If images are not a floating-point tensor.
            ValueError: If the images have another shape than in training, or draws is below 1.
        """
        checks.check_at_least(draws, 1, "draws")
        sampler = sampler or ODESampler(1)
        checks.check_whole(sampler.times)
        if not self.joint.two_times:
            warn_of_more_steps(sampler)
        seeds, shape = seeds_of(seeds, len(images)), known_shape(self.label_shape)
        noises = label_noise(shape, seeds, draws, self.device).unbind(1)
        solved = (self.solve_labels(images, noise, sampler).x for noise in noises)
        return self.states.posterior(solved)

    def solve_labels(self, images: Tensor, noise: Tensor, sampler: ODESampler) -> Solution:
        """Carry label noise ``(B, *label_shape)`` from time 1 to label states at time 0."""
        with evaluating(self):
            return self.joint.solve_codes(sampler, self._latents(images), self.as_state(noise))

    def _latents(self, images: Tensor) -> Tensor:
        """Return the states ``(B, *sample_shape)`` of given images."""
        like = self.as_state(torch.empty(0))
        return self.as_state(self.states.known(images, known_shape(self.sample_shape), like))

    def _condition(self, labels: Cond) -> tuple[Tensor, Tensor]:
        """Return states of labels (zero without a label), and True per sample without a label."""
        labels, shape = to_device(labels, self.device), known_shape(self.label_shape)
        y, hidden = self.states.condition(labels, shape, may_hide=self.label_dropout > 0)
        return self.as_state(y), hidden.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store also the shape of a label's state."""
        super().on_save_checkpoint(checkpoint)
        shape = self.label_shape
        checkpoint["flowkit"]["label_shape"] = None if shape is None else list(shape)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore also the shape of a label's state."""
        shape = checkpoint["flowkit"]["label_shape"]
        self.label_shape = None if shape is None else tuple(shape)
        super().on_load_checkpoint(checkpoint)
