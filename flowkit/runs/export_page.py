"""The page beside an export: what it holds, and the lines that draw from it."""

from typing import Any

from flowkit.modules.card import front_matter

LINES = {
    "torch": """import torch

draw = torch.export.load("model.pt2").module()
torch.manual_seed(0)
data = draw(torch.randn({count}, {shape}){torch_labels})
""",
    "onnx": """import onnxruntime, torch

session = onnxruntime.InferenceSession("model.onnx")
torch.manual_seed(0)
inputs = {{"noise": torch.randn({count}, {shape}).numpy(){onnx_labels}}}
data = session.run(None, inputs)[0]
""",
    "diffusers": """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
images = pipeline({diffusers_labels}, generator=torch.manual_seed(0)).images
""",
}
NEEDS = {
    "torch": "torch {torch} or a later version that reads its files, and a CPU",
    "onnx": "onnxruntime (or another runtime of ONNX opset {opset})",
    "diffusers": "diffusers {diffusers} or later, and torch",
}


def readme(record: dict[str, Any]) -> str:
    """Return the page of an export, from its record."""
    classes, checks = record["classes"], record["checks"]
    lines = LINES[record["format"]].format(**_filled(record))
    needs = NEEDS[record["format"]].format(opset=record["opset"], **record["versions"])
    license = record["license"]
    head = f"{front_matter({'license': license})}\n\n" if license else ""
    labels = "It takes no labels."
    if classes is not None:
        names = ", ".join(f"{k} {name}" for k, name in enumerate(classes[:100]))
        labels = f"Labels: {names}; {len(classes)} means no label."
    weights, times = record["weights"], ", ".join(f"{t:.6g}" for t in record["grid"])
    facts = [
        f"Input: noise {_shape(record['inputs']['noise'])}, float32. Output: "
        f"{_shape(record['output'])}, float32.",
        labels,
        f"Guidance: {record['guidance']:g}. Solver: {record['method']}, "
        f"{len(record['grid']) - 1} steps at the times {times}.",
        f"Convention: {record['convention']}.",
        f"Weights: {weights.get('kind', 'as given')}, SHA-256 {weights['hash']}.",
        f"License: {license or 'not stated'}.",
        f"Checked: {checks['samples']} samples in batches of "
        f"{', '.join(map(str, checks['batches']))} differ from those of the run by at most "
        f"{checks['largest difference']:.2g} (allowed {checks['tolerance']:.2g}).",
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    return f"""{head}# A flow that draws samples from noise

Written by flowkit, which it does not need. It needs {needs}.

```python
{lines}```

The noise is yours to draw, by any generator. flowkit's own samples start from noise with a seed of
its own for each sample, so an equal seed gives other samples there.

{listed}
"""


def _shape(sizes: list[Any]) -> str:
    """Return a shape as text."""
    return f"({', '.join(map(str, sizes))})"


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the lines of code leave open."""
    shape = ", ".join(map(str, record["inputs"]["noise"][1:]))
    if record["classes"] is None:
        labels = {"torch_labels": "", "onnx_labels": "", "diffusers_labels": "batch_size=10"}
        return {"count": 10, "shape": shape, **labels}
    chosen = list(range(min(10, len(record["classes"]))))
    return {
        "count": len(chosen),
        "shape": shape,
        "torch_labels": f", torch.tensor({chosen})",
        "onnx_labels": f', "labels": torch.tensor({chosen}).numpy()',
        "diffusers_labels": f"class_labels={chosen}",
    }
