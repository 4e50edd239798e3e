"""The list of objects that a stored configuration may call without being trusted, see `trust`."""

from importlib import import_module
from typing import Any

from torch import nn

# Modules whose own public classes are listed, if they are subclasses of a class.
CLASSES: dict[str, type] = {
    "flowkit": object,
    "flowkit.adapters": object,
    "flowkit.audio": object,
    "flowkit.autoencoders": object,
    "flowkit.blockwise": object,
    "flowkit.couplings": object,
    "flowkit.data": object,
    "flowkit.exact": object,
    "flowkit.guidance": object,
    "flowkit.inpainting": object,
    "flowkit.metrics": object,
    "flowkit.modules": object,
    "flowkit.nn": object,
    "flowkit.paths": object,
    "flowkit.policies": object,
    "flowkit.sampling": object,
    "flowkit.symmetrical": object,
    "flowkit.times": object,
    "torch.nn": nn.Module,
    "torch.optim": object,
    "torch.optim.lr_scheduler": object,
}

KINDS = ("DC", "KL", "RAE", "Tiny")  # of autoencoders

# Other names. Left out are callbacks that write or delete files at places that a checkpoint names,
# and networks that read other networks by a path or from the hub.
NAMES: dict[str, tuple[str, ...]] = {
    "diffusers": (
        "AsymmetricAutoencoderKL",
        "AuraFlowTransformer2DModel",
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderOobleck",
        "AutoencoderTiny",
        "DiTTransformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanDiT2DModel",
        "LatteTransformer3DModel",
        "Lumina2Transformer2DModel",
        "PixArtTransformer2DModel",
        "PriorTransformer",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "StableAudioDiTModel",
        "Transformer2DModel",
        "UNet1DModel",
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UVit2DModel",
        "VQModel",
    ),
    "flowkit.autoencoders": tuple(f"{kind}Autoencoder.from_pretrained" for kind in KINDS),
    "flowkit.blockwise": ("MaskedEncoder.load", "copies"),
    "flowkit.grids": ("blockwise", "load", "power", "shifted", "uniform"),
    "flowkit.nn": ("autoencoder_kl", "unet2d"),
    "flowkit.runs": (
        "classifier_error",
        "classifier_features",
        "clip_features",
        "dinov2_features",
        "features_for",
        "inception_features",
        "network_features",
        "own_grid",
        "own_sampler",
        "pixel_features",
        "saved_grid",
    ),
    "functools": ("partial",),
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor",
        "EMAWeightAveraging",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "LearningRateMonitor",
        "ModelSummary",
        "RichModelSummary",
        "RichProgressBar",
        "StochasticWeightAveraging",
        "TQDMProgressBar",
        "ThroughputMonitor",
        "Timer",
        "WeightAveraging",
    ),
    "lightning.pytorch.loggers": (
        "CSVLogger",
        "MLFlowLogger",
        "TensorBoardLogger",
        "WandbLogger",
    ),
    "transformers": (
        "CLIPTextConfig",
        "CLIPTextModel",
        "CLIPVisionConfig",
        "CLIPVisionModel",
        "Dinov2Config",
        "Dinov2Model",
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        "T5Config",
        "T5EncoderModel",
        "ViTConfig",
        "ViTModel",
    ),
}

# The only arguments of a name whose other arguments choose servers and credentials.
ARGUMENTS = {
    **{
        f"flowkit.autoencoders.{kind}Autoencoder.from_pretrained": (
            *("path", "image_shape", "subfolder", "revision", "variant"),
        )
        for kind in KINDS
    },
    # They send to the user's own server and account, which only his environment names.
    "lightning.pytorch.loggers.MLFlowLogger": ("experiment_name", "run_name", "save_dir"),
    "lightning.pytorch.loggers.WandbLogger": ("project", "name", "save_dir", "offline"),
}

# Arguments of networks of transformers that choose code of the hub.
REFUSED = ("attn_implementation", "_attn_implementation", "attribute_map", "quantization_config")


def find(name: str) -> Any:
    """Return the listed object of a dotted name, or None. No other module is imported for this.

    The name is a listed module and the name of the object there, or the module and qualified name
    under which Python knows the object.

    >>> find("torch.optim.AdamW") is find("torch.optim.adamw.AdamW")
    True
    >>> find("flowkit.modules.load_run") is find("flowkit.paths.torch.os.system") is None
    True
    """
    parts = name.split(".")
    for public in (parts[-1], ".".join(parts[-2:])):
        for module in {*CLASSES, *NAMES}:
            found = _listed(module, public) if name.startswith(f"{module}.") else None
            known_as = {f"{module}.{public}", f"{_home(found)}.{public}"}
            if found is not None and name in known_as:
                return found
    return None


def _listed(module: str, public: str) -> Any:
    """Return an object of a module if it is listed, and is what its name says; None otherwise."""
    by_name = public in NAMES.get(module, ())
    if not by_name and (module not in CLASSES or "." in public or public.startswith("_")):
        return None
    found: Any = import_module(module)
    for part in public.split("."):
        found = getattr(found, part, None)
    if by_name:  # the same package: a name that a package shows may be of another one
        package = module.partition(".")[0]
        return found if _home(found).partition(".")[0] == package else None
    own = isinstance(found, type) and found.__qualname__ == public
    at_home = f"{_home(found)}.".startswith(f"{module}.")
    return found if own and at_home and issubclass(found, CLASSES[module]) else None


def _home(found: Any) -> str:
    """Return the module in which an object is defined."""
    return str(getattr(found, "__module__", ""))
