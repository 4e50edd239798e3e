"""Sizes of what settings of an evaluation do to a Fréchet distance, as measured."""

Range = tuple[float, float]

FEATURES = ("conv-classifier-digits", "conv-classifier-fashionmnist")
"""Names of the feature networks that the sizes were measured in; others have other sizes."""

# Smallest and largest relative change in two runs, against the first value of each setting: the
# table of docs/evaluation.md.
EFFECTS: dict[str, dict[str, Range]] = {
    "quantization": {
        "round": (0.0, 0.0),
        "floor": (0.0, 0.0),
        "truncate": (-0.016, -0.008),
    },
    "file format": {
        "lossless": (0.0, 0.0),
        "jpeg 95": (0.009, 0.022),
        "jpeg 90": (0.035, 0.058),
        "jpeg 75": (0.16, 0.224),
        "jpeg 50": (0.398, 1.0),
    },
    "resize": {
        "lanczos with antialiasing": (0.0, 0.0),
        "bicubic with antialiasing": (-0.021, 0.872),
        "bilinear with antialiasing": (0.446, 11.025),
        "box with antialiasing": (-0.011, 3.241),
        "bicubic without antialiasing": (0.612, 24.214),
        "bilinear without antialiasing": (-0.013, 3.416),
    },
    "reference": {
        "test": (0.0, 0.0),
        "train": (0.027, 0.159),
    },
    "weights": {
        "averaged": (0.0, 0.0),
        "raw": (-0.039, -0.002),
    },
    "Euler steps": {
        "25": (0.0, 0.0),
        "8": (0.124, 0.308),
        "50": (-0.067, -0.048),
    },
}
