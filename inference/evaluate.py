"""How robust a model is: what the leaderboard sees, and what is true.

    python inference/evaluate.py --checkpoint runs/quickstart --out report
    python inference/evaluate.py --model benchmarks.cifar10_resnet18:with_gcm --image_size 32 \\
        --data.name folder --data.root cifar10 --out report

Every attack is run through the model as it is (oblivious) and with its masking revealed (adaptive),
and scored on the whole model. The report folder gets report.html, report.json, per_image.csv and
plots. Interrupted, the same command goes on where it was; a finished report is made anew. Runs
under python, accelerate launch and torchrun; processes, workers and interruptions change no byte.
Attacks work on 32 images of 224 pixels at once, on up to 128 smaller ones, on a GPU on four times
as many, and on fewer where memory does not hold them.
"""

import sys
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import InitProcessGroupKwargs

import robust_submission
from robust_submission.cli.command import Names, Ratios, run
from robust_submission.cli.errors import UserError
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.data.loader import micro_batch_size
from robust_submission.evaluation import wording
from robust_submission.evaluation.batch import Measure
from robust_submission.evaluation.cache import (
    Journal,
    code_digest,
    digest,
    model_digest,
    source_digest,
)
from robust_submission.evaluation.evaluation_data import (
    DataOptions,
    EvaluationData,
    open_evaluation_data,
)
from robust_submission.evaluation.memory import FittingBatches
from robust_submission.evaluation.plan import plan_jobs
from robust_submission.evaluation.results import Findings
from robust_submission.evaluation.runner import Evaluation
from robust_submission.evaluation.views import Target, build_target
from robust_submission.models.load import load_named
from robust_submission.report.build import build_report, gallery_pictures, per_image_table
from robust_submission.runtime import provenance, start_accelerator

CODE = Path(robust_submission.__file__).parent


@dataclass(kw_only=True)
class Options:
    """An evaluation."""

    out: Path
    """Folder of the report, made if it is missing."""
    checkpoint: Path | None = None
    """A run folder, or any folder with config.json and model.safetensors."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, which gives a callable from images (0 to 1)
    to logits; a timm model with its published weights; or a Hugging Face hub id."""
    trn: Path | None = None
    """Run folder of a TRN to put before the model."""
    image_size: int | None = None
    """Side of the images for --model, where the model does not say it."""
    twin: Path | None = None
    """Checkpoint to transfer attacks from; by default the model itself without its defences."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images."""
    limit: int | None = 1000
    """At most so many images, drawn with the seed and stratified by class; null for all."""
    attacks: Names = Names("fgsm,pgd,autoattack")
    """fgsm, ffgsm, bim, mim, pgd, cw (L2), autoattack or one of its parts: apgd-ce, apgd-t,
    apgd-dlr, fab, fab-t, square. Noise and a transfer attack come on top."""
    norm: Literal["linf", "l2", "l1", "l1-dense"] = "linf"
    """The norm that epsilon bounds."""
    epsilon: Ratios = Ratios("8/255")
    """Largest changes, in pixel values from 0 to 1; the two large numbers are of the first."""
    steps: int = 20
    """Steps of bim, mim and pgd."""
    draws: int = 5
    """Draws of a random model that are scored."""
    eot: int = 10
    """Draws of a random model that an adaptive attack averages over; other ones."""
    curves: bool = True
    """Measure accuracy against epsilon and against steps as well, and what they reveal."""
    curve_images: int | None = None
    """Images of the curves; null for a tenth, at least 32 and at most 100."""
    seed: int = 0
    """Of every random draw."""
    batch_size: int = 64
    """Images that each process reads at a time; changes no result."""
    num_workers: int = 0
    """Processes that read images; changes no result."""

    def __post_init__(self) -> None:
        counts = ("limit", "steps", "draws", "eot", "curve_images", "image_size", "batch_size")
        for name in (*counts, "num_workers", "seed"):
            least = 1 if name in counts else 0
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--{name}: expected at least {least}, found {value}.")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out: expected a folder, found the file {self.out}.")
        if not self.attacks or not self.epsilon:
            raise UserError("expected at least one of --attacks and of --epsilon, found none.")
        if min(self.epsilon) <= 0 or (self.norm == "linf" and max(self.epsilon) > 1):
            raise UserError(
                "--epsilon: expected radii above 0, for linf at most 1, as pixels are 0 to 1 "
                f"(8/255), found {', '.join(f'{each:g}' for each in self.epsilon)}."
            )
        names = [wording.radius(each, self.norm) for each in set(self.epsilon)]
        if len(set(names)) < len(names):
            raise UserError(
                "--epsilon: expected radii that differ in the digits that name them "
                f"({max(names, key=names.count)}), found {', '.join(map(str, self.epsilon))}."
            )


def load_target(options: Options, data: EvaluationData, device: torch.device) -> Target:
    """The model, tried on the first images."""
    named = load_named(options.checkpoint, options.model, options.image_size, options.trn)
    twin = load_named(options.twin, None).model if options.twin else None
    few = ImageDataset(data.source, data.indices[:8], named.image_size)
    images = collate([few[place] for place in range(len(few))], named.image_size)["images"]
    return build_target(named, twin, images, data.class_names, device)


def journal_settings(options: Options, data: EvaluationData, measure: Measure) -> dict[str, Any]:
    """All that decides the result of a job on a chunk, under the names that a user knows."""
    target, some = measure.target, torch.zeros(2, 3, *[measure.target.image_size] * 2)
    of_data = [data.indices.tobytes(), data.labels.tobytes(), "\n".join(data.source.ids).encode()]
    model = options.model or ""  # a function's code, and what it keeps, is no tensor
    return {
        "version": code_digest(CODE),
        "packages": provenance()["packages"],
        "model": [model, source_digest(model.partition(":")[0]), model_digest(target.model, some)],
        "twin": model_digest(target.twin, some),
        "data": digest(of_data),
        "curve_images": data.curve_images,
        "image_size": target.image_size,
        "norm and epsilon": [options.norm, options.epsilon[0]],
        "seed": options.seed,
        "draws": [measure.draws, measure.eot],
    }


def write(findings: Findings, options: Options) -> None:
    """Write the report folder and print the table."""
    from robust_submission.report.write import print_table, write_report

    settings = asdict(options)
    for name in ("out", "batch_size", "num_workers", "data", "seed"):
        del settings[name]
    plain = {name: str(each) if isinstance(each, Path) else each for name, each in settings.items()}
    report = build_report(findings, plain, options.seed)
    write_report(report, gallery_pictures(findings), per_image_table(findings), options.out)
    print_table(report)
    print(options.out / "report.html")


def evaluate(options: Options) -> None:
    """Attack, judge, report."""
    # A process waits for another's whole chunk, every attack on it: longer than torch's 10 minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = start_accelerator(mixed_precision="no", kwargs_handlers=[patience])
    data = open_evaluation_data(
        options.data, options.checkpoint, options.limit, options.curve_images, options.seed
    )
    target = load_target(options, data, accelerator.device)
    plan = plan_jobs(
        options.attacks, options.norm, options.epsilon, options.steps, target, options.curves
    )
    measure = Measure(
        target,
        ball=(options.norm, options.epsilon[0]),
        seed=options.seed,
        draws=options.draws,
        eot=options.eot,
        fit=FittingBatches(micro_batch_size(target.image_size)),
    )
    journal = Journal(options.out / ".journal", journal_settings(options, data, measure))
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        if word := journal.prepare():
            print(word, file=sys.stderr)
    accelerator.wait_for_everyone()
    results = Evaluation(
        accelerator=accelerator,
        measure=measure,
        data=data,
        jobs=plan.distinct(target),
        journal=journal,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    ).run()
    if accelerator.is_main_process:
        write(Findings(measure=measure, data=data, plan=plan, results=results), options)
        journal.remove()
    accelerator.end_training()


if __name__ == "__main__":
    run(evaluate, Options)
