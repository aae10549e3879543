"""Evaluate a model against attackers who know its defence, and against those who don't.

    python inference/evaluate.py --checkpoint runs/quickstart --out report
    python inference/evaluate.py --model benchmarks.cifar10_resnet18:with_gcm --image_size 32 \\
        --data.name folder --data.root cifar10 --out report

Every attack is run on the model as it is (oblivious) and on the model with its masking revealed
(adaptive), and scored on the whole model. The report folder gets report.html, report.json,
per_image.csv and plots. After an interruption the same command continues; a finished report is made
anew, and so are its images of --save_images unless somebody has changed that folder. Runs under
python, accelerate launch and torchrun; processes, workers and interruptions change no byte. Attacks
work on 32 images of 224 pixels at once, on up to 128 smaller ones, on a GPU on four times as many,
and on fewer if memory does not hold them.
"""

import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_submission.cli.command import Names, Ratio, Ratios, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable, checkpoint_files
from robust_submission.settings import DataOptions, EvaluationSettings

if TYPE_CHECKING:
    from robust_submission.attacks import Model
    from robust_submission.evaluation.data import EvaluationData

IMAGES_RECORD = ".images"
"""A file of the report folder: the digest of the folder of `save_images`."""


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationSettings):
    """An evaluation."""

    out: Path
    """Folder of the report, made if it is missing."""
    checkpoint: Path | None = None
    """A run folder, or any folder with config.json and model.safetensors."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function or path/file.py:function, which returns a
    callable from images (0 to 1) to logits; a timm model with its published weights; or a Hugging
    Face hub id."""
    trn: Path | None = None
    """Run folder of a TRN to put before the model."""
    image_size: int | None = None
    """Side of the images for --model, if the model does not say it."""
    twin: Path | None = None
    """Checkpoint to transfer attacks from; by default the model itself without its defences."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images."""
    limit: int | None = 1000
    """Largest number of images, drawn with the seed and stratified by class; null for all."""
    attacks: Names = Names("fgsm,pgd,autoattack")
    """fgsm, ffgsm, bim, mim, pgd, cw (L2), fmn (Linf, L1), ddn (L2), autoattack or one of its
    parts: apgd-ce, apgd-t, apgd-dlr, fab, fab-t, square; screen (Linf, L2), its fast stand-in on
    honest models. Noise and a transfer attack are added."""
    epsilon: Ratios = Ratios("8/255")
    """Radii in pixel values from 0 to 1; the headline numbers are for the first."""
    corruptions: Names = Names()
    """Also measure accuracy on corrupted images, each kind at severities 1 to 5: all, or names such
    as gaussian_noise,fog; by default none."""
    curve_images: int | None = None
    """Images of the curves; null for a tenth, at least 32 and at most 100."""
    batch_size: int = 64
    """Images that each process reads at a time; changes no result."""
    num_workers: int = 0
    """Processes that read images; changes no result."""
    compile: bool = False
    """Compile the checkpoint's backbone (torch.compile), on one GPU as CUDA graphs, for small
    images and long attacks: it takes a minute or more first. Results differ by rounding. Not with
    a TRN, nor with fab."""
    save_adversarial: Path | None = None
    """A .pt file for the adversarial images: one tensor (N, 3, S, S), 0 to 1, in the order of the
    data, as RobustBench takes it; its claim is written to robustbench.md beside the report."""
    save_images: Path | None = None
    """A folder for the adversarial images as PNG files of the images' names: a new one, or as an
    evaluation with the same --out left it, which is replaced."""
    fail_below: Ratio | None = None
    """For CI: exit with status 1, after all is written, if the adaptive robust accuracy (0 to 1) is
    lower, or not known as the evaluation failed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "curve_images", "image_size", "batch_size", "num_workers"):
            least = 0 if name == "num_workers" else 1
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--{name}: expected at least {least}, found {value}.")
        if self.fail_below is not None and not 0 <= self.fail_below <= 1:
            raise UserError(f"--fail_below: expected 0 to 1, found {self.fail_below:g}.")
        images, replaced = self.save_images, self.replaces_images()
        if images and images.exists() and not replaced:
            expected = "a new folder, or one that an evaluation with the same --out wrote"
            raise UserError(f"--save_images: expected {expected}, found {images}.")
        read = checkpoint_files(self.checkpoint, self.trn, self.twin)
        for path in filter(None, (self.save_adversarial, None if replaced else images)):
            check_writable(path, *read, self.data.root)
        if self.compile and self.model is not None:
            raise UserError(f"--compile: expected a --checkpoint, found --model {self.model}.")
        if self.compile and "fab" in self.attacks:
            # It differentiates every logit of one forward pass, compiled code one result once.
            raise UserError("--compile: expected fab-t, which can be compiled, found fab.")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out: expected a folder, found the file {self.out}.")

    def replaces_images(self) -> bool:
        """Whether the folder of `save_images` is as an evaluation left it, and no input."""
        folder, record, root = self.save_images, self.out / IMAGES_RECORD, self.data.root
        if not folder or folder.is_symlink() or not (folder.is_dir() and record.is_file()):
            return False
        read = root is not None and root.resolve().is_relative_to(folder.resolve())
        return not read and record.read_text() == content_digest(folder)

    @property
    def shown(self) -> dict[str, Any]:
        """What the report gives as its settings."""
        hidden = ("out", "batch_size", "num_workers", "data", "seed", "fail_below")
        hidden += ("save_adversarial", "save_images")
        values = {name: value for name, value in asdict(self).items() if name not in hidden}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def content_digest(folder: Path) -> str:
    """Name everything in a folder, files by their bytes."""
    state = sha256()
    for path in sorted(folder.rglob("*")):
        state.update(f"{path.relative_to(folder)}\0".encode())
        state.update(sha256(path.read_bytes() if path.is_file() else b"").digest())
    return state.hexdigest()


def load_twin(path: Path, data: "EvaluationData", image_size: int) -> "Model":
    """The model to transfer from; UserError if it has other classes or takes another size."""
    from robust_submission.models.load import load_named

    twin = load_named(path, None)
    data.require_classes_of(twin.class_names, path)
    if twin.image_size != image_size:
        expected = f"a twin for the model's {image_size} px"
        raise UserError(f"--twin {path}: {expected}, found {twin.image_size} px.")
    return twin.model


def main(options: Options) -> None:
    """Evaluate and write the report."""
    from accelerate import InitProcessGroupKwargs

    from robust_submission.api import run_evaluation
    from robust_submission.evaluation.data import open_evaluation_data
    from robust_submission.evaluation.results import Results
    from robust_submission.evaluation.views import build_views, device_of
    from robust_submission.models.load import load_named
    from robust_submission.models.trn import TRN
    from robust_submission.report.adversarial import AdversarialFiles
    from robust_submission.report.schema import Report
    from robust_submission.report.text import print_table
    from robust_submission.runtime import compile_mode, start_accelerator

    # A process waits for another's whole chunk, every attack on it: longer than torch's 10 minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = start_accelerator(float64=True, mixed_precision="no", kwargs_handlers=[patience])
    data = open_evaluation_data(
        options.data, options.checkpoint, options.limit, options.curve_images, options.seed
    )
    data = replace(data, batch_size=options.batch_size, num_workers=options.num_workers)
    named = load_named(options.checkpoint, options.model, options.image_size, options.trn)
    if options.compile and isinstance(getattr(named.model, "restore", None), TRN):
        # Its gradient map is differentiated again, which compiled code does not support.
        raise UserError(f"--compile: expected a model without TRN, found {named.name} with one.")
    data = data.matched_to(named.class_names)
    twin = load_twin(options.twin, data, named.image_size) if options.twin else None
    few = data.first_images(named.image_size)
    device = device_of(named, few, accelerator.device)
    views = build_views(named, twin, few, data.class_names, device, options)
    data = data.numbered(views.num_classes)
    mode = compile_mode(accelerator, graphs=not views.random)
    tensor, folder, claim = options.save_adversarial, options.save_images, "robustbench.md"
    files = AdversarialFiles(tensor, folder, options.out / claim, views, data)

    def save(results: Results, report: Report) -> None:
        if folder and options.replaces_images():
            shutil.rmtree(folder)
        files.write(results, report)
        if folder:
            with atomic_write(out / IMAGES_RECORD) as temporary:
                temporary.write_text(content_digest(folder))

    shown, out = options.shown, options.out
    report = run_evaluation(
        views,
        data,
        options,
        shown,
        out=out,
        accelerator=accelerator,
        compiled=views.compiled(mode) if options.compile else None,
        save=save if tensor or folder else None,
    )
    if accelerator.is_main_process:
        print_table(report)
        print(options.out / "report.html")
    accelerator.end_training()
    worth, wanted = report.adaptive.value, options.fail_below
    if not accelerator.is_main_process or wanted is None:
        return
    if report.verdict == "evaluation failed":
        raise UserError("--fail_below: expected a number to compare, found: evaluation failed.")
    if worth < wanted:
        raise UserError(
            f"--fail_below: expected an adaptive robust accuracy of at least {wanted:g}, found at "
            f"most {worth:.4g}."
        )


if __name__ == "__main__":
    run(main, Options)
