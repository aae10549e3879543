"""A local leaderboard for a submission: clean, corrupted, black-box and white-box images.

    python submission/score.py submission.zip --checkpoint runs/quickstart --limit 200

In each draw an image gets one corruption, one black-box and one white-box attack, as on the real
leaderboard, which drew its attacks once: another submission of the same weights may score anywhere
in the interval. The organisers' white-box attackers are oblivious: they attack the model as it is.
The last column has adaptive ones, who know the defence (BPDA for GCM, expectation over random
draws). Weights, attacks and sizes are in robust_submission/leaderboard/weights.yaml; --config
reads another file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from robust_submission.cli.command import Names, Ratios, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable, checkpoint_files
from robust_submission.cli.numbers import plural
from robust_submission.leaderboard.settings import DEFAULTS, AttackPool, Weights
from robust_submission.settings import DataOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """A local leaderboard."""

    file: Path = field(metadata={"positional": True})
    """The submission: a .zip or .onnx file."""
    checkpoint: Path | None = None
    """The run that the submission was made of: gives the images, and vouches for its code."""
    trn: Path | None = None
    """The run of the TRN that the submission was made of."""
    twin: Path | None = None
    """A checkpoint to transfer attacks from; by default the submission without its defences."""
    trust: bool = False
    """Run the submission's code in this process although package.py did not make it."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default the test images of the run."""
    limit: int = 200
    """At most this many images, stratified by class."""
    image_size: int | None = None
    """Side of the input in pixels; by default the checkpoint's, or 224."""
    draws: int = 5
    """Number of times that attacks are drawn."""
    seed: int = 0
    """Seed of the choice of images and of all draws."""
    out: Path | None = None
    """A JSON file for the result."""
    weights: Weights = field(default_factory=Weights)
    """Weight of each part in the score."""
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Severities of the corruptions."""
    black_box: Names = Names("transfer,square")
    """Attacks without the model's gradients."""
    white_box: Names = Names("fgsm,pgd,mim")
    """Attacks with them."""
    epsilon: Ratios = Ratios("2/255,4/255,8/255")
    """Linf radii of the attacks."""
    steps: int = 10
    """Steps of the iterated attacks."""
    queries: int = 300
    """Queries of Square."""

    def __post_init__(self) -> None:
        for name in ("limit", "draws", "steps", "queries"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 1, found {getattr(self, name)}.")

    @property
    def pool(self) -> AttackPool:
        """The attacks to draw from."""
        names = ("severities", "black_box", "white_box", "epsilon", "steps", "queries", "seed")
        return AttackPool(**{name: getattr(self, name) for name in names})


def score(options: Options) -> None:
    """Measure the submission and print the board.

    Raises:
        UserError: the twin takes images of another size; see also `loaded_submission` and
            `open_evaluation_data`.
    """
    from rich.console import Console

    from robust_submission.data.dataset import ImageDataset
    from robust_submission.evaluation.data import open_evaluation_data
    from robust_submission.leaderboard.board import Board, remarks
    from robust_submission.leaderboard.load import loaded_submission, require_logits
    from robust_submission.leaderboard.scorer import Scorer, measure_columns
    from robust_submission.models.classifier import undefended
    from robust_submission.models.load import load_checkpoint
    from robust_submission.runtime import provenance

    if options.out is not None:
        read = checkpoint_files(options.checkpoint, options.trn, options.twin)
        check_writable(options.out, options.file, *read, options.data.root)
    pool = options.pool
    data = open_evaluation_data(options.data, options.checkpoint, options.limit, 1, options.seed)
    origin = load_checkpoint(options.checkpoint, options.trn) if options.checkpoint else None
    data = data.matched_to(origin.class_names if origin else None)
    size = options.image_size or (origin.image_size if origin else 224)
    twin = load_checkpoint(options.twin) if options.twin else None
    if twin is not None:
        data.require_classes_of(twin.class_names, options.twin)
        if twin.image_size != size:
            expected = f"a twin for the submission's {size} px"
            raise UserError(f"--twin {options.twin}: {expected}, found {twin.image_size} px.")
        twin = undefended(twin)
    trust = options.trust
    with loaded_submission(options.file, origin=origin, twin=twin, trust=trust) as submission:
        require_logits(options.file, submission.model, size, data.class_names)
        scorer = Scorer(submission, pool)
        options.weights.of(scorer.columns)
        images = ImageDataset(data.source, data.indices, size)
        board = Board(
            columns=measure_columns(scorer, images, options.draws), weights=options.weights
        )
    counts = f"{plural(len(images), 'image')}, {plural(options.draws, 'draw')}"
    Console().print(board.table(f"{options.file}: {counts}"))
    for remark in remarks(scorer):
        print(remark)
    if options.out is not None:
        with atomic_write(options.out) as temporary:
            content = {"score": board.as_json(), "provenance": provenance()}
            temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(score, Options, default_config=DEFAULTS)
