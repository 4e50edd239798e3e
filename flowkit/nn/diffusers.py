"""Networks of the diffusers library as velocities."""


from torch import nn


class DiffusersVelocity(nn.Module):
    """A diffusers network, read as a velocity: ``v(x, t, cond) = net(x, time_scale·t, cond)``.

    The network is *trained as* a velocity with flowkit's time, 0 at noise and 1 at data, such as
    a fresh ``UNet2DModel`` or ``DiTTransformer2DModel``. A network that was pretrained under
    another convention needs an adapter instead.

    A tensor condition goes to ``class_labels``; a mapping holds keyword arguments of the network,
    e.g. ``encoder_hidden_states`` and ``pooled_projections`` of an ``SD3Transformer2DModel``.
    Labels lie in ``[0, num_classes]``, the last being the null label. diffusers' transformers
    drop labels at random in training, by the global generator and in every block anew; that is
    switched off here, so that ``DropCond`` alone drops them.

    Args:
        net: A network called as ``net(x, timestep=..., ...)`` that returns an object with
            ``sample``.
        time_scale: The time step of ``t = 1``.
        channels_last: Keep weights and images in memory channels last; ``None`` does so on a
            GPU-less or any other device alike for UNets.
        drop_sigma: Keep only the first half of the output's channels, of a network that also
            learned a variance.

    Raises:
        ValueError: If the network returns twice the channels it takes and ``drop_sigma`` is off.
    """

    def __init__(
        self,
        net: nn.Module,
        time_scale: float = 1000.0,
        channels_last: bool | None = None,
        drop_sigma: bool = False,
    ):
        super().__init__()
