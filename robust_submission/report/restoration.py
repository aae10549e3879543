"""A picture of what a TRN does: clean, attacked, gradient map, restored and remaining error."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from robust_submission.attacks import Attack
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.trn import TRN
from robust_submission.report.style import INK

AMPLIFIED = 8
"""How many times the remaining error is enlarged."""
WRONG = "#b0102a"


def restoration_pictures(
    model: RobustClassifier, images: Tensor, labels: Tensor, attack: Attack, seeds: Tensor
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Pictures (B, 3, H, W), 0 to 1, by title, with predictions (B,) if there are any."""
    trn, twin = model.restore, undefended(model)
    assert isinstance(trn, TRN)
    attacked = attack(twin, images, labels, seeds=seeds)
    maps = trn.gradient_map(attacked, model.classify)
    with torch.no_grad():
        restored = trn.restore(attacked, maps)
        predictions = [twin(each).argmax(1) for each in (images, attacked, restored)]
    left = (0.5 + AMPLIFIED * (restored - images)).clamp(0, 1)
    shown = {"clean": (images, predictions[0]), "attacked": (attacked, predictions[1])}
    if maps is not None:
        shown["gradient map"] = ((0.5 + maps / 6).clamp(0, 1), None)
    shown["restored"] = (restored, predictions[2])
    shown[f"restored - clean, {AMPLIFIED} times"] = (left, None)
    return shown


def draw_restoration(
    shown: dict[str, tuple[Tensor, Tensor | None]], labels: Tensor, class_names: list[str]
) -> Figure:
    """One row per image, one column per entry of `shown`."""
    figure = Figure(figsize=(1.7 * len(shown), 1.85 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(shown), squeeze=False)
    for column, (title, (pictures, predictions)) in enumerate(shown.items()):
        grid[0][column].set_title(title, fontsize=9, pad=8)
        for row, picture in enumerate(pictures):
            axes: Axes = grid[row][column]
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[], frame_on=False)
            if predictions is not None:
                right = predictions[row] == labels[row]
                axes.set_xlabel(
                    class_names[int(predictions[row])],
                    color=INK if right else WRONG,
                    fontsize=8,
                    parse_math=False,
                )
    return figure
