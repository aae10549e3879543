"""A local leaderboard for a package: clean, corrupted, black-box and white-box images.

    python submission/score.py submission.zip --checkpoint runs/quickstart --limit 200

Each image meets one corruption, one black-box and one white-box attack a draw, as on the real one,
where attacks were drawn once: one more submission of the same weights may well fall anywhere in the
interval. The organisers attack the model as it is; beside it stands the same board with white-box
attackers who know its defence (GCM passed straight through, random draws averaged). Shares, attacks
and sizes are in robust_submission/leaderboard/weights.yaml; give another with --config.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from robust_submission.attacks import Model
from robust_submission.cli.command import Names, Ratios, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.loader import ImageDataset, evaluation_loader, micro_batches
from robust_submission.evaluation.evaluation_data import DataOptions, open_evaluation_data
from robust_submission.evaluation.wording import plural
from robust_submission.leaderboard import scorer
from robust_submission.leaderboard.load import Origin, load_contestant, unfit
from robust_submission.leaderboard.scorer import PARTS, Score, Scorer, Setting, interval
from robust_submission.models.load import load_checkpoint
from robust_submission.runtime import provenance

WEIGHTS = Path(scorer.__file__).parent / "weights.yaml"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each part counts; only their ratios matter."""

    clean: float = 4
    """Of images as they are."""
    corrupted: float = 4
    """Of corrupted images."""
    black_box: float = 4
    """Of attacks without the model's gradients."""
    white_box: float = 3
    """Of attacks with them."""

    def __post_init__(self) -> None:
        values = vars(self).values()
        if min(values) < 0 or not sum(values):
            raise UserError("weights: expected none below 0 and not all 0.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A local leaderboard."""

    file: Path = field(metadata={"positional": True})
    """The submission: a .zip or .onnx file."""
    checkpoint: Path | None = None
    """The run that it was made of: gives the images, and vouches for the package."""
    trn: Path | None = None
    """The run of the TRN that it was made of."""
    twin: Path | None = None
    """A checkpoint to transfer attacks from; by default the package without its defences."""
    trust: bool = False
    """Run the package's code in this process though package.py did not make it."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default the test images of the run."""
    limit: int = 200
    """At most so many images, stratified by class."""
    image_size: int | None = None
    """Side of the input; by default the checkpoint's, or 224."""
    draws: int = 5
    """How often attacks are drawn."""
    seed: int = 0
    """Of the choice of images and of all draws."""
    out: Path | None = None
    """A JSON file for the result."""
    weights: Weights = field(default_factory=Weights)
    """What each part counts."""
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Of corruptions."""
    black_box: Names = Names("transfer,square")
    """Attacks without the model's gradients."""
    white_box: Names = Names("fgsm,pgd,mim")
    """Attacks with them."""
    epsilon: Ratios = Ratios("2/255,4/255,8/255")
    """Sizes of attacks, in the largest change of a pixel."""
    steps: int = 10
    """Of the iterated attacks."""
    queries: int = 300
    """Of Square."""

    def __post_init__(self) -> None:
        for name in ("limit", "draws", "steps", "queries"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 1, found {getattr(self, name)}.")

    @property
    def setting(self) -> Setting:
        """What the attackers do."""
        names = ("severities", "black_box", "white_box", "epsilon", "steps", "queries", "seed")
        return Setting(**{name: getattr(self, name) for name in names})


def measure(scorer: Scorer, dataset: ImageDataset, draws: int) -> dict[str, list[float]]:
    """The share of right answers in each column, one number a draw."""
    loader = evaluation_loader(dataset, batch_size=32, num_workers=0)
    rounds = [(column, draw) for column in scorer.columns for draw in range(draws)]
    right = dict.fromkeys(rounds, 0)
    with tqdm(total=len(dataset) * len(rounds), unit="image") as bar:
        for batch in micro_batches(loader):
            count = batch["count"]
            seen = (batch["images"][:count], batch["labels"][:count], batch["indices"][:count])
            for column, draw in rounds:
                bar.set_description(column)
                if column == "clean" and draw:  # nothing in it is drawn
                    right[column, draw] = right[column, 0]
                else:
                    right[column, draw] += int(scorer.judge(column, draw, *seen).sum())
                bar.update(count)
    return {
        column: [right[column, draw] / len(dataset) for draw in range(draws)]
        for column in scorer.columns
    }


def table(title: str, score: Score) -> Table:
    """The board for the terminal."""
    drawn = Table(title=Text(title, "bold"), title_justify="left")
    for column in ("part", "weight", "as the organisers attack", "by who knows the defence"):
        drawn.add_column(column, justify="left" if column == "part" else "right")
    mass = sum(score.weights[part] for part in PARTS if part in score.columns)
    for part in PARTS:
        if part in score.columns:
            known = score.columns["adaptive" if part == "white_box" else part]
            share = f"{score.weights[part] / mass:.0%}"
            drawn.add_row(part, share, _words(score.columns[part]), _words(known))
    drawn.add_section()
    drawn.add_row("score", "", _words(score.total()), _words(score.total(adaptive=True)))
    return drawn


def _words(draws: list[float]) -> str:
    mean, low, high = interval(draws).values()
    return f"{mean:.1%}" if low is None else rf"{mean:.1%} \[{low:.1%}, {high:.1%}]"


def score(options: Options) -> None:
    """Measure the package and print the board.

    Raises:
        UserError: see `load_contestant` and `open_evaluation_data`.
    """
    if options.out is not None:
        check_writable(options.out)
    setting = options.setting
    data = open_evaluation_data(options.data, options.checkpoint, options.limit, 1, options.seed)
    size = options.image_size or 224
    if options.image_size is None and options.checkpoint is not None:
        size = load_checkpoint(options.checkpoint).image_size
    with tempfile.TemporaryDirectory(prefix="score-") as folder:
        origin = Origin(checkpoint=options.checkpoint, trn=options.trn)
        contestant = load_contestant(
            options.file, Path(folder), origin, options.twin, options.trust
        )
        check_logits(options.file, contestant.model, size, len(data.class_names))
        scorer = Scorer(contestant, setting)
        if not sum(getattr(options.weights, part) for part in PARTS if part in scorer.columns):
            raise UserError("weights: expected one above 0 of a measured part, found none.")
        columns = measure(scorer, ImageDataset(data.source, data.indices, size), options.draws)
    result = Score(columns=columns, weights=dict(vars(options.weights)))
    images, draws = plural(len(data.indices), "image"), plural(options.draws, "draw")
    title = f"{options.file}: {images}, {draws}"
    Console().print(table(title, result))
    for remark in remarks(scorer):
        print(remark)
    if options.out is not None:
        content = {"score": result.as_json(), "provenance": provenance()}
        with atomic_write(options.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_logits(package: Path, model: Model, size: int, num_classes: int) -> None:
    """Raise ValueError unless the model gives an image of that size one logit a class."""
    try:
        logits = model(torch.zeros(1, 3, size, size))
    except Exception as error:  # a stranger's code may raise anything
        raise unfit(package, error) from error
    if logits.shape != (1, num_classes):
        found = " x ".join(map(str, logits.shape))
        raise UserError(f"{package}: expected logits 1 x {num_classes}, found {found}.")


def remarks(scorer: Scorer) -> list[str]:
    """What a reader of the board must know of it."""
    found, contestant = list[str](), scorer.contestant
    if contestant.twin is None:
        found.append("no transfer attack: nothing to transfer from; give --twin or --checkpoint.")
    if not contestant.differentiable:
        found.append("white box: autograd cannot follow ONNX, so nothing was attacked by gradient.")
    if not contestant.known:
        tried = "gradients, " if contestant.differentiable else ""
        blind = " and ".join(scorer.black_box) or "nothing else"
        found.append(f"its defence is not known: the right column tries {tried}{blind}.")
    return found


if __name__ == "__main__":
    run(score, Options, default_config=WEIGHTS)
