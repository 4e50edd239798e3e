"""Networks of the diffusers library as velocities."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import as_labels, as_sizes, check_integer, check_labels
from flowkit.nn.embed import SidesError, check_cond, check_state, look_up, sinusoid, zeroed
from flowkit.types import Cond


class DiffusersVelocity(nn.Module):
    """Network of the diffusers library as a velocity ``v(x, t, cond)``.

    The equation is ``v(x, t, cond) = net(x, time_scale·t, cond)``.

    The network is *trained as* a velocity with flowkit's time (0 at noise, 1 at data), for example
    a new ``UNet2DModel`` or ``DiTTransformer2DModel``. A network pretrained under another
    convention needs an adapter of `flowkit.adapters` instead.

    A tensor condition becomes the argument ``class_labels``. A mapping holds keyword arguments of
    the network, such as ``encoder_hidden_states`` and ``pooled_projections`` of an
    ``SD3Transformer2DModel``; ``tokens`` and ``token_mask`` are other names of
    ``encoder_hidden_states`` and ``encoder_attention_mask``, and ``vector`` is one of
    ``class_labels``, for a ``UNet2DConditionModel`` with ``class_embed_type="projection"``, which
    needs no tokens if none of its parts reads them. What a UNet would ignore is refused. Labels lie
    in ``[0, num_classes]``, and the last label is the null label. The setting ``num_class_embeds``
    of a UNet counts the null label; ``num_embeds_ada_norm`` of a transformer does not. In training,
    transformers of diffusers drop labels themselves, in each block anew, with the global generator.
    This class switches that off, so only ``DropCond`` drops labels.

    Args:
        net: Network with the call ``net(x, timestep=..., ...)`` and the result ``.sample``.
        time_scale: Timestep of the network at ``t = 1``.
        channels_last: Whether weights and images are stored with channels last, which is often
            faster for convolutions on GPUs. Small UNets on a CPU were 1.05 to 1.3 times slower with
            it.
        drop_sigma: Whether to return only the first half of the output channels, for a network with
            twice as many output as input channels (a learned variance).
        num_times: Number of times per sample, 1 or 2. With 2, ``t`` is ``(B, 2)``; the second time
            is embedded as labels are, with no effect at the start. Only for a ``UNet2DModel``.

    Raises:
        ValueError: If ``drop_sigma`` does not match the channels of the network, or ``num_times``
            is neither 1 nor 2, or 2 for another network.

    >>> velocity = unet2d((1, 8, 8), num_classes=10, width=8)
    >>> velocity(torch.zeros(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        time_scale: float = 1000.0,
        channels_last: bool = False,
        drop_sigma: bool = False,
        num_times: int = 1,
    ) -> None:
        from diffusers.models.embeddings import LabelEmbedding

        super().__init__()
        config = getattr(net, "config", None)
        inputs = getattr(config, "in_channels", None)
        outputs = getattr(config, "out_channels", None)
        doubled = inputs is not None and outputs == 2 * inputs
        if doubled != drop_sigma:
            raise ValueError(
                f"drop_sigma must be {doubled} for a network of {inputs} input and {outputs} "
                f"output channels, got {drop_sigma}"
            )
        self.channels = inputs
        self.factor = 2 ** (len(getattr(config, "block_out_channels", [0])) - 1)
        self.num_classes = _num_classes(config)
        self.vectors = getattr(config, "class_embed_type", None) in VECTORS
        self._learn_arguments(net)
        self.time_scale, self.drop_sigma = time_scale, drop_sigma
        self.num_times = num_times
        if num_times != 1:
            table = getattr(net, "class_embedding", net)
            if num_times != 2 or not isinstance(table, nn.Embedding | None):
                raise ValueError(
                    "num_times must be 1, or 2 for a UNet2DModel with a table of labels or without "
                    f"labels, got {num_times} for {type(net).__name__}"
                )
            net.class_embedding = _SecondTime(net, time_scale)
        self.channels_last = channels_last
        if channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for part in net.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is a tensor for a network without class labels, or names what is
                no argument of the network, what it would ignore, or not all that it needs.
            ValueError: If a shape does not fit, or a label is missing or out of its range.
        """
        if x.ndim == 4 and self.channels not in (None, x.shape[1]):
            raise ValueError(f"x must have {self.channels} channels, got shape {tuple(x.shape)}")
        check_state(x, t, tuple(x.shape[1:]), self.num_times)
        options = self._options(cond, len(x))
        labels = options.get("class_labels")
        if self.num_times == 2:
            t, second = t.unbind(1)
            options = {**options, "class_labels": (labels, second)}
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            out = self.net(x, timestep=self.time_scale * t, **options).sample
        except IndexError:
            if self.num_classes is not None and labels is not None:
                check_labels(labels, self.num_classes + 1, "cond")
            raise
        except RuntimeError as error:
            if x.ndim == 4 and any(side % self.factor for side in x.shape[2:]):
                raise SidesError(x.shape, self.factor) from error
            raise
        return out.chunk(2, 1)[0] if self.drop_sigma else out

    def with_second_time(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a network of one time for this one; the second has no effect."""
        new = {k: v for k, v in self.state_dict().items() if k.startswith(SECOND_TIME)}
        new.pop(LABELS, None)
        return {**new, **state}

    def _learn_arguments(self, net: nn.Module) -> None:
        """Find out what the network is called with, must be called with, and would ignore."""
        parameters = inspect.signature(net.forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self.arguments = {p.name for p in named}
        self.takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        state = {p.name for p in named[:1]} | {"timestep"}
        self.needed = {p.name for p in named if p.default is p.empty} - state
        self.ignored = set[str]()
        if not _attends(getattr(net, "config", None)):
            self.ignored |= set(ARGUMENTS.values())
        if hasattr(net, "class_embedding"):
            without = net.class_embedding is None
            (self.ignored if without else self.needed).add("class_labels")

    def _options(self, cond: Cond, batch: int) -> dict[str, Any]:
        """Return keyword arguments of the network."""
        names = {**ARGUMENTS, "vector": "class_labels"} if self.vectors else ARGUMENTS
        if isinstance(cond, Mapping):
            pairs = [(names.get(name, name), x) for name, x in cond.items()]
        else:
            pairs = [("class_labels", x) for x in self._labels(cond, batch)]
        given = [name for name, _ in pairs]
        wrong = {
            "missing": self.needed - self.ignored - set(given),
            "unknown": set() if self.takes_any else set(given) - self.arguments,
            "without effect": set(given) & self.ignored & self.arguments,
            "given twice": {name for name in given if given.count(name) > 1},
        }
        if any(wrong.values()):
            got = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            told = ", ".join(f"{what} {sorted(names)}" for what, names in wrong.items() if names)
            raise TypeError(
                f"cond must name arguments of {type(self.net).__name__}, got {got}; {told}"
            )
        options: dict[str, Any] = dict(pairs)
        for name in self.needed & self.ignored:  # the tokens of a UNet that attends to none
            options[name] = None
        if self.num_classes is not None and "class_labels" in options:
            options["class_labels"] = as_labels(options["class_labels"])
        return options

    def _labels(self, cond: Tensor | None, batch: int) -> list[Tensor]:
        """Return the labels of a condition that is no mapping, or nothing."""
        if "class_labels" not in self.arguments and cond is not None:
            raise TypeError(
                "cond must be a mapping of keyword arguments of "
                f"{type(self.net).__name__}, got a tensor"
            )
        labels = check_cond(cond, batch, self.num_classes)
        return [] if labels is None else [labels]


ARGUMENTS = {"tokens": "encoder_hidden_states", "token_mask": "encoder_attention_mask"}
VECTORS = ("projection", "simple_projection", "identity")  # embeddings of vectors, not of labels
SECOND_TIME, LABELS = "net.class_embedding.", "net.class_embedding.weight"


class _SecondTime(nn.Module):
    """Embedding of labels and of a second time, in the place of a UNet's embedding of labels.

    The table of labels keeps its name, so that the weights of a UNet of one time fit.
    """

    def __init__(self, net: Any, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        width, labels = net.time_embedding.linear_2.out_features, net.class_embedding
        self.weight = None if labels is None else labels.weight
        self.inputs = nn.Linear(width, width)
        self.outputs = zeroed(nn.Linear(width, width))

    def forward(self, given: tuple[Tensor | None, Tensor]) -> Tensor:
        """Return ``(B, width)`` for labels ``(B,)`` or None, and times ``(B,)``."""
        labels, t = given
        waves = sinusoid(t, self.inputs.in_features, self.time_scale).to(self.inputs.weight.dtype)
        c = self.outputs(F.silu(self.inputs(waves)))
        return c if self.weight is None or labels is None else c + look_up(self.weight, labels)


def _attends(config: Any) -> bool:
    """Return False for a UNet of whose parts none reads tokens."""
    if getattr(config, "addition_embed_type", None) is not None:
        return True
    sides = [*getattr(config, "down_block_types", []), *getattr(config, "up_block_types", [])]
    return any(
        "Cross" in str(block) for block in [*sides, getattr(config, "mid_block_type", "Cross")]
    )


def _num_classes(config: Any) -> int | None:
    """Return the number of classes of a diffusers network, without the null label."""
    if getattr(config, "class_embed_type", None) is not None:
        return None
    if rows := getattr(config, "num_class_embeds", None):
        return rows - 1
    return getattr(config, "num_embeds_ada_norm", None)


def unet2d(
    shape: Sequence[int],
    num_classes: int | None = None,
    width: int = 32,
    multipliers: Sequence[int] = (1, 2, 2),
    layers: int = 1,
    dropout: float = 0.0,
    channels_last: bool = False,
    num_times: int = 1,
    time_scale: float = 1000.0,
) -> DiffusersVelocity:
    """Build a new ``UNet2DModel`` for images of one shape; its output is zero at the start.

    Each level halves the image, as long as both sides are even. Images of 32 and 28 pixels have
    room for at least three levels (28, 14, 7), images of 8 pixels for four. Further ``multipliers``
    have no effect. The lowest level has self-attention.

    Args:
        shape: ``(C, H, W)`` of the images.
        num_classes: Number of classes, for labels ``(B,)`` in ``[0, num_classes]``; the last label
            is the null label.
        width: Channels of the first level.
        multipliers: Channels of each level, in units of ``width``.
        layers: Number of residual blocks per level.
        dropout: Dropout probability of the residual blocks, in [0, 1].
        channels_last: Memory format, as for `DiffusersVelocity`.
        num_times: Number of times per sample, 1 or 2, as for `DiffusersVelocity`.
        time_scale: Timestep of the network at ``t = 1``. Mean flows need a small one, such as 10,
            since they learn from the derivative with respect to time.

    Raises:
        ValueError: If ``shape`` is not ``(C, H, W)`` or a size is below 1.

    >>> unet2d((1, 28, 28), width=16).net.config.block_out_channels
    (16, 32, 32)
    """
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    sizes = {"width": width, "layers": layers, "multipliers": len(multipliers)}
    for name, size in {**sizes, "num_classes": 1 if num_classes is None else num_classes}.items():
        check_integer(size, name, 1)
    channels, *sides = as_sizes(shape, "shape")
    halvings = min((n & -n).bit_length() - 1 for n in sides)
    widths = tuple(width * m for m in as_sizes(multipliers, "multipliers"))[: halvings + 1]
    net = UNet2DModel(
        sample_size=(sides[0], sides[1]),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
        layers_per_block=layers,
        dropout=dropout,
        norm_num_groups=math.gcd(32, width),
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    for parameter in net.conv_out.parameters():
        nn.init.zeros_(parameter)
    return DiffusersVelocity(net, time_scale, channels_last, num_times=num_times)


if TYPE_CHECKING:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]


def autoencoder_kl(
    shape: Sequence[int],
    width: int = 32,
    multipliers: Sequence[int] = (1, 2, 2),
    latent_channels: int = 4,
    layers: int = 1,
) -> "AutoencoderKL":
    """Build a new, small ``AutoencoderKL`` for images of one shape.

    Each level after the first halves the sides of the latents.

    Args:
        shape: ``(C, H, W)`` of the images.
        width: Channels of the first level.
        multipliers: Channels of each level, in units of ``width``.
        latent_channels: Channels of the latents.
        layers: Number of residual blocks per level.

    Raises:
        ValueError: If ``shape`` is not ``(C, H, W)`` or a size is below 1.

    >>> autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)).config.sample_size
    [8, 8]
    """
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    sizes = {"width": width, "multipliers": len(multipliers), "layers": layers}
    for name, size in {**sizes, "latent_channels": latent_channels}.items():
        check_integer(size, name, 1)
    channels, *sides = as_sizes(shape, "shape")
    return cast(Any, AutoencoderKL)(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(multipliers),
        up_block_types=("UpDecoderBlock2D",) * len(multipliers),
        block_out_channels=tuple(width * m for m in as_sizes(multipliers, "multipliers")),
        layers_per_block=layers,
        latent_channels=latent_channels,
        # A group has at least four channels: a norm of a single channel removes the brightness.
        norm_num_groups=max(1, math.gcd(128, width) // 4),
        sample_size=sides,
        scaling_factor=1.0,
    )
