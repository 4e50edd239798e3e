"""Blockwise flow matching: training of a velocity in blocks, in two stages."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowkit.autoencoders import Autoencoder, Identity
from flowkit.blockwise import Blockwise, alignment_loss, blockwise_loss, residual_loss
from flowkit.blockwise.alignment import Projector, resize_tokens, token_sides
from flowkit.blockwise.losses import draw_segments
from flowkit.blockwise.parts import PlainStack
from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling, Independent
from flowkit.guidance import DropCond
from flowkit.modules.checkpoints import weights_of
from flowkit.modules.flow import FlowModule
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear, Path
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Cond
from flowkit.velocity import Velocity

Encoder = Callable[[Tensor], Tensor]


class BlockwiseFlowMatching(FlowModule, frozen=("encoder",)):
    """Train a velocity in blocks, `flowkit.blockwise.Blockwise`, in two stages.

    - ``stage="flow"`` trains trunk and stacks on the flow-matching loss: the mean over segments of
      the mean loss in each segment. With an encoder, the trunk also trains on
      ``align_weight · L_align``. This term turns the features of the trunk to the encoder's tokens
      of the clean image (semantic feature guidance).
    - ``stage="fra"`` trains the feature residual alone. All other parts are frozen.

    The loss of each segment is logged (``segment_3``), and so is the norm of each stack's gradient
    (``gradient_3``). A warning names the stacks that never get a gradient. See `flowkit.blockwise`
    for the losses. Source: *Blockwise Flow Matching*, 2025 (arXiv 2510.21167).

    Args:
        velocity: The blocks.
        encoder: Maps images to tokens ``(B, N, D)``; for images that are not square it has the
            attribute ``sides``, the rows and columns of the tokens. Or a ``functools.partial`` that
            makes such an encoder at its first use: a run can then be loaded without the encoder's
            files.
        align_weight: λ, at least 0; 0.05 in the release, 0.5 in an earlier configuration.
        align_stop: From this step on λ is 0; with None, λ never becomes 0.
        encoder_width: Size of the encoder's tokens; None takes the encoder's ``width``.
        projector_width: Width of the projector from features to tokens. Only training uses the
            projector.
        stage: ``"flow"`` or ``"fra"``.
        start: Run folder with the weights for the start of a fit: a run of stage 1 for stage 2, an
            earlier run to train some of its stacks, or a plain run whose network becomes every
            stack.
        segments: Train only the stacks of these segments, at the times of these segments; None
            trains all stacks.
        compare: Quantity that stage 2 compares: ``"features"`` or ``"velocity"``.
        path: Gives the state of a pair at time ``t``, and its velocity.
        coupling: Pairs noise with data.
        times: Density of training times within each segment.
        autoencoder: Maps data to states of the flow. The encoder sees the data.
        drop_cond: Drops conditions in training, for classifier-free guidance.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    Raises:
        TypeError: If the velocity has no blocks.
        ValueError: If an argument is out of range, or if a part that the stage needs is missing.

    >>> from flowkit.blockwise import BlockwiseMLP
    >>> module = BlockwiseFlowMatching(BlockwiseMLP((2,), edges=2, width=16))
    >>> sorted(module.loss({"x1": torch.randn(8, 2)}))
    ['explained', 'loss', 'segment_0', 'segment_1']
    """

    of_training = ("projector",)

    def __init__(
        self,
        velocity: Blockwise,
        encoder: Encoder | partial | None = None,
        align_weight: float = 0.05,
        stage: str = "flow",
        align_stop: int | None = None,
        encoder_width: int | None = None,
        projector_width: int = 2048,
        start: str | FilePath | None = None,
        segments: Sequence[int] | None = None,
        compare: str = "features",
        path: Path = Linear(),
        coupling: Coupling = Independent(),
        times: Times = Uniform(),
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        if not isinstance(velocity, Blockwise):
            raise TypeError(
                f"velocity must be a Blockwise, got {type(velocity).__name__}; "
                "Blockwise(None, flowkit.blockwise.copies(network, M), M) makes blocks of a network"
            )
        check_choice(stage, ("flow", "fra"), "stage")
        check_choice(compare, ("features", "velocity"), "compare")
        check_at_least(align_weight, 0, "align_weight")
        needed = {
            "trunk": stage == "fra" or encoder is not None,
            "feature_residual": stage == "fra",
        }
        for name, wanted in needed.items():
            if wanted and getattr(velocity, name) is None:
                raise ValueError(f"{name} must be part of the velocity for this training, got None")
        self.stage, self.compare, self.start = stage, compare, start
        self.path, self.coupling, self.times = path, coupling, times
        self.segments = self._train_only(segments)
        self.align_weight, self.align_stop = align_weight, align_stop
        self.encoder, self.projector = encoder, None
        if encoder is not None:
            width = encoder_width or getattr(encoder, "width", None)
            if width is None:
                raise ValueError(
                    "encoder_width must be given for an encoder without a width, got None"
                )
            self.projector = Projector(velocity.trunk.width, width, projector_width)
        self.turn = 0
        self._idle = set(self._trained_stacks())

    def _train_only(self, segments: Sequence[int] | None) -> list[int] | None:
        """Freeze the parts that do not train; return the sorted segments, or None for all.

        Raises:
            ValueError: If there are no segments, or if a segment is out of range.
        """
        flow, chosen = self.flow, None
        if segments is not None:
            chosen = sorted({int(m) for m in segments})
            if not chosen or not (chosen[0] >= 0 and chosen[-1] < flow.num_segments):
                raise ValueError(
                    f"segments must lie in [0, {flow.num_segments - 1}], got {list(segments)}"
                )
        if self.stage == "fra":
            flow.requires_grad_(False)
            flow.feature_residual.requires_grad_(True)
            return chosen
        if isinstance(flow.feature_residual, nn.Module):
            flow.feature_residual.requires_grad_(False)
        if chosen is not None:
            flow.requires_grad_(False)
            for m in chosen:
                flow.stacks[m].requires_grad_(True)
        return chosen

    def train(self, mode: bool = True) -> "BlockwiseFlowMatching":
        """Set training mode. Frozen parts stay in ``eval`` mode, so that their dropout is off."""
        super().train(mode)
        if self.stage == "fra" or self.segments is not None:
            for part in self.flow.modules():
                weights = list(part.parameters())
                if weights and not any(p.requires_grad for p in weights):
                    part.eval()  # also all parts within this part
        return self

    @property
    def flow(self) -> Blockwise:
        """The velocity, as a `Blockwise`."""
        return cast(Blockwise, self.velocity)

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> Velocity:
        """Return the velocity of one solve, so that a sampler accepts the module itself."""
        return self.flow.bind(cond, grid)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch in this stage, and its parts by segment.

        Raises:
            ValueError: If alignment needs images but the batch holds cached latents, or if the
                coupling reorders ``x1``.
        """
        images, batch = batch["x1"], self.encode(batch, generator)
        draw = draw_segments(
            self.flow,
            batch,
            self.path,
            self.coupling,
            self.times,
            self.drop_cond,
            generator,
            segments=self.segments,
            turn=self.turn if self.training else 0,
        )
        self.turn += self.training
        if self.stage == "fra":
            return residual_loss(self.flow, draw, self.path, generator, self.compare)
        terms, h = blockwise_loss(self.flow, draw)
        if self.encoder is None or not self._align_weight():
            return terms
        if "encoded_by" in batch:
            raise ValueError(
                "batch must hold images for the encoder, got cached latents; train on images with "
                "an autoencoder, or without an encoder"
            )
        if draw.pairs.x1 is not batch["x1"]:
            raise ValueError(
                f"coupling must keep x1 in place for an encoder, got {type(self.coupling).__name__}"
            )
        align = self._alignment(h, images)
        loss = terms["loss"] + self._align_weight() * align
        return {**terms, "loss": loss, "flow": terms["loss"].detach(), "align": align.detach()}

    def _align_weight(self) -> float:
        """Return λ of the current step."""
        stopped = self.align_stop is not None and self.global_step >= self.align_stop
        return 0.0 if stopped else self.align_weight

    def _alignment(self, h: Tensor, images: Tensor) -> Tensor:
        """Return ``L_align`` of features ``h`` and the encoder's tokens of the images, a scalar."""
        if isinstance(self.encoder, partial):
            made = self.encoder()
            self.encoder = made.to(images.device) if isinstance(made, nn.Module) else made
        with torch.no_grad():
            tokens = cast(Encoder, self.encoder)(images)
            sides = token_sides(self.encoder, images, tokens.shape[1])
            tokens = resize_tokens(tokens, sides, self.flow.trunk.sides)
        h = h if h.ndim == 3 else h[:, None]
        return alignment_loss(cast(nn.Module, self.projector)(h), tokens)

    # --- start of a fit --------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take the weights of ``start``.

        In stage ``fra`` without a start or a checkpoint there is a warning: the trunk may be
        random.
        """
        super().on_fit_start()
        if self.stage == "fra" and self.start is None and not self._begun:
            warnings.warn(
                "stage fra trains on the trunk as it is, since start is not given; `flowkit "
                "blockwise run=...` starts from a trained trunk",
                stacklevel=2,
            )

    def take_start(self, place: str | FilePath) -> None:
        """Load the weights of the run."""
        self.take_weights(weights_of(place))

    def take_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load weights of the same blocks, or weights of one plain network into every stack.

        The weights of the feature residual and of the projector may be missing or superfluous.

        Raises:
            RuntimeError: If other weights are missing or superfluous.
        """
        state = {k: v for k, v in state.items() if k.startswith(("velocity.", "projector."))}
        stacks = self.flow.stacks
        if all(isinstance(stack, PlainStack) for stack in stacks) and not any(
            k.startswith("velocity.stacks.") for k in state
        ):
            plain = {k.removeprefix("velocity."): v for k, v in state.items()}
            for stack in stacks:
                stack.net.load_state_dict(plain)
            return
        missing, unexpected = self.load_state_dict(state, strict=False)
        optional = ("velocity.feature_residual.", "projector.")
        wrong = [k for k in (*missing, *unexpected) if not k.startswith(optional)]
        if wrong:
            raise RuntimeError(
                f"start must hold weights of these blocks, got a run that differs in {wrong[:5]}"
            )

    # --- telemetry -------------------------------------------------------------------------

    def _trained_stacks(self) -> list[int]:
        """Return the numbers of the stacks with trainable parameters."""
        return [
            m
            for m, stack in enumerate(self.flow.stacks)
            if isinstance(stack, nn.Module) and any(p.requires_grad for p in stack.parameters())
        ]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of each stack's gradient, and note which stacks have had a gradient."""
        every = cast(Any, self.trainer).log_every_n_steps
        due = bool(every) and (self.global_step + 1) % every == 0
        for m in self._trained_stacks() if due else sorted(self._idle):
            gradients = [p.grad for p in self.flow.stacks[m].parameters() if p.grad is not None]
            if not gradients:
                continue
            norm = nn.utils.get_total_norm(gradients)
            if norm > 0:
                self._idle.discard(m)
            if due:
                self.log(f"train/gradient_{m}", norm)

    def on_validation_start(self) -> None:
        """Warn about stacks that have had no gradient so far."""
        trainer = cast(Any, self.trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._report_idle()

    def on_train_end(self) -> None:
        """Warn about stacks that have had no gradient in the whole fit."""
        self._report_idle()

    def _report_idle(self) -> None:
        """Warn once about stacks without a gradient."""
        if self._idle and self.global_step:
            warnings.warn(
                f"every stack must get gradients, got none for stacks {sorted(self._idle)} in "
                f"{self.global_step} steps",
                stacklevel=2,
            )
            self._idle.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store also the turn, the number of batches dealt to the segments so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flowkit"]["turn"] = self.turn

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the turn."""
        super().on_load_checkpoint(checkpoint)
        self.turn = checkpoint["flowkit"]["turn"]
