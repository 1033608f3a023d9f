"""The card of a trained model: what it was trained on, by which recipe, how good it is, and how it is used."""

from __future__ import annotations

from typing import Any

from timm.models._hub import generate_readme

from fastlt.markdown_table import markdown_table
from fastlt.recipe import without_paths
from fastlt.run.log import percent
from fastlt.run.trained import TrainedRun
from loaders.sources import SOURCES

MOST_CLASSES = 200  # in the table of classes; the config beside the card has all of them

OF_TIMM = """
The model is in timm's form, and fastlt is not needed:

```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(1)
names = model.pretrained_cfg["label_names"]
```

Logits are those of the trained model. timm resizes images by another filter than the training, which shrank by area: a
probability can differ a little. `fastlt.load` cuts and resizes as the training did.
"""
OF_FASTLT = """
{reason}. Without fastlt, use an export: `fastlt export RUN --to onnx`, `--to torch` or `--to torchscript`.
"""
OF_TIMM_AND_FASTLT = """
timm knows the network once fastlt has been imported:

```python
import fastlt.models, timm

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()
```
"""
BY_FASTLT = """
By fastlt:

```python
import fastlt

model = fastlt.load("PATH/TO/THIS/FOLDER")
predictions = model.predict(["image.jpg"], top=5)
```
"""


def model_card(trained: TrainedRun) -> dict[str, Any]:
    """The card without its use, in the parts that timm writes a README from."""
    run, counts, data = trained.run, trained.counts, trained.recipe.data
    result = measured(trained)
    accuracy = "" if result is None else f" Its top-1 accuracy on the test split is {percent(result['top1'])} %."
    images = counts.counts
    cut = f"the central square of {data.eval_ratio:.4g} of the shorter side" if data.eval_crop == "center" else "none"
    return {
        "tags": ["image-classification", "timm", "fastlt", "long-tailed"],
        "license": "unknown",
        "description": f"A `{trained.recipe.model.name}` for {counts.num_classes} classes, trained on long-tailed data "
        f"by fastlt.{accuracy}",
        "details": {
            "Training images": f"{images.sum():,} of {counts.num_classes} classes, from {images.max():,} to "
            f"{images.min():,} a class (imbalance factor {counts.imbalance_factor:.4g})",
            "Method": ", then ".join(f"{s.method} with {s.loss}" for s in trained.recipe.stages.values()),
            "Model": f"{trained.select} of stage {run.stage}, after iteration {trained.iteration}",
            "Head": f"{trained.recipe.model.head}",
            "Image size": f"{data.image_size} x {data.image_size}; cut of an image: {cut}",
            "Mean and standard deviation": f"{tuple(data.mean)}, {tuple(data.std)}",
            "Precision of the test": trained.recipe.precision,
        },
        "usage": "",
    }


def readme(trained: TrainedRun, reason: str | None, *, of_timm: bool) -> str:
    """The text of README.md.

    reason: why timm alone cannot load the model. of_timm: whether the files are in its form.
    """
    card = model_card(trained)
    card["usage"] = usage(trained, reason, of_timm=of_timm)
    if reason is not None:
        card["library_name"] = "fastlt"
    return generate_readme(card, trained.recipe.name)


def usage(trained: TrainedRun, reason: str | None, *, of_timm: bool) -> str:
    """The use of the model, its results, and how it was trained: Markdown."""
    elsewhere = OF_FASTLT.format(reason=reason) + (OF_TIMM_AND_FASTLT if of_timm else "")
    own = OF_TIMM if reason is None else elsewhere
    return own + BY_FASTLT + _results(trained) + _training(trained)


def measured(trained: TrainedRun) -> dict[str, Any] | None:
    """The metrics of a model on the test split, as in result.json; None for a model that was not measured there.

    Only the result of the run has the accuracy of every class.
    """
    result = trained.run.result
    return result if trained.select == trained.run.select else result.get("selection", {}).get(trained.select)


def _results(trained: TrainedRun) -> str:
    result, counts = measured(trained), trained.counts
    if result is None:
        return "\n## Results\n\nThis model of the run was not measured on the test split.\n"
    masks = counts.shot_masks()
    groups = [["overall", counts.num_classes, int(counts.counts.sum()), percent(result["top1"])]]
    groups += [
        [f"{name}-shot", int(mask.sum()), int(counts.counts[mask].sum()), percent(result[name])]
        for name, mask in masks.items()
    ]
    others = {"top-5": "top5", "macro-F1": "macro_f1", "ECE": "ece"}
    more = ", ".join(f"{word} {percent(result[key])} %" for word, key in others.items())
    of_groups = markdown_table(["", "classes", "training images", "top-1 %"], groups)
    text = f"\n## Results on the test split\n\n{of_groups}\n\n{more}.\n"
    accuracy = result.get("per_class_accuracy")
    if accuracy is None:
        return text
    order = sorted(range(counts.num_classes), key=lambda c: -counts.counts[c])
    rows = [[_cell(counts.names[c]), int(counts.counts[c]), percent(accuracy[c])] for c in order]
    which = "All classes"
    if len(rows) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        which = f"The {half} largest and the {half} smallest classes; `config.json` has all {len(rows)}"
        rows = [*rows[:half], *rows[-half:]]
    return f"{text}\n{which}:\n\n{markdown_table(['class', 'training images', 'top-1 %'], rows)}\n"


def _training(trained: TrainedRun) -> str:
    root = " data.root=DIR" if "root" in SOURCES[trained.recipe.data.source].takes else ""
    versions = ", ".join(f"{name} {of}" for name, of in trained.run.result["versions"].items())
    return (
        "\n## Training\n\nWith this recipe as `recipe.yaml`, paths for file names, and the data set at hand:\n\n"
        f"    fastlt train recipe.yaml{root}\n\n"
        f"```yaml\n{without_paths(trained.recipe).to_yaml()}```\n\nMade with {versions}.\n"
    )


def _cell(name: str) -> str:
    """A class name in a cell of a Markdown table."""
    return " ".join(name.replace("\\", "\\\\").split())
