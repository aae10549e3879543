"""Draw what a TRN does: clean, attacked, gradient map, restored and remaining error, as one PNG.

    python inference/show_trn.py --checkpoint runs/cifar10 --trn runs/cifar10_trn --out trn.png

The attacker knows the classifier but not the TRN. The images are correct when clean. Under each
picture is the prediction of the classifier without the TRN, in red if it is wrong.
"""

from dataclasses import dataclass, field
from pathlib import Path

from robust_submission.cli.command import Ratio, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import check_writable, checkpoint_files
from robust_submission.settings import DataOptions


@dataclass(kw_only=True)
class Options:
    """A picture."""

    out: Path
    """The picture, a PNG."""
    checkpoint: Path | None = None
    """Run folder of the classifier."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that gives a
    RobustClassifier."""
    trn: Path | None = None
    """Run folder of the TRN; not needed where the checkpoint has one."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default the test images of the run."""
    limit: int = 8
    """How many images, drawn with the seed and stratified by class."""
    epsilon: Ratio = Ratio("8/255")
    """Radius of PGD-10 in L-infinity, in pixel values from 0 to 1."""
    seed: int = 0
    """Of the images and the attack."""

    def __post_init__(self) -> None:
        if self.limit < 1 or not 0 < self.epsilon <= 1:
            raise UserError(
                "expected --limit of at least 1 and --epsilon above 0, at most 1; "
                f"found {self.limit} and {self.epsilon:g}."
            )


def main(options: Options) -> None:
    """Attack a few images, restore them and draw the result."""
    import matplotlib as mpl
    import numpy as np
    import torch

    from robust_submission.attacks import build_attack, image_seeds
    from robust_submission.data.dataset import ImageDataset, collate
    from robust_submission.evaluation.data import open_evaluation_data
    from robust_submission.evaluation.results import choose_gallery
    from robust_submission.models.classifier import undefended
    from robust_submission.models.load import load_restoring
    from robust_submission.report.restoration import draw_restoration, restoration_pictures
    from robust_submission.report.style import STYLE, write_png

    read = checkpoint_files(options.checkpoint, options.trn)
    check_writable(options.out, *read, options.data.root)
    name, model = load_restoring(options.checkpoint, options.model, options.trn)
    some = 4 * options.limit
    data = open_evaluation_data(options.data, options.checkpoint, some, 1, options.seed)
    data = data.matched_to(model.class_names)
    dataset = ImageDataset(data.source, np.sort(data.indices), model.image_size)
    batch = collate([dataset[place] for place in range(len(dataset))], model.image_size)
    with torch.no_grad():
        predictions = undefended(model)(batch["images"]).argmax(1)
    kept = choose_gallery(predictions.numpy(), batch["labels"].numpy(), options.limit)
    if not kept:
        raise UserError(f"{name}: expected an image that it gets right, found none.")
    images, labels, indices = (batch[key][kept] for key in ("images", "labels", "indices"))
    attack = build_attack("pgd", options.epsilon, steps=10)
    shown = restoration_pictures(model, images, labels, attack, image_seeds(options.seed, indices))
    with mpl.rc_context(STYLE):
        write_png(draw_restoration(shown, labels, data.class_names), options.out, dots=110)


if __name__ == "__main__":
    run(main, Options)
