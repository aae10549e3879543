"""What to train, and which defences to put in front, for the score of the local leaderboard.

    python benchmarks/leaderboard.py --images data/raw/cifar10 --out table.md

Trains one small network by each objective on the same images for the same epochs, packages it
without a defence, with GCM, with resize-and-pad, and with both, which are the same weights, and has
submission/score.py score each package on the same test images. `score` is against attackers who
differentiate the model as it is, as challenges score; `adaptive score` against those who know the
defence. A TRN is trained for the objectives in `--trn` and scored as one more defence, with GCM.
Networks that are there are used again if they were trained by the same recipe, a TRN if its network
was not trained since; packages and scores are made anew.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.command import Names, parse, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.sources import read_recipe
from robust_submission.training.recipe import Recipe, TRNRecipe, as_plain
from robust_submission.training.run_folder import MAY_CHANGE, changed_key
from timing import ROOT, Words, python, run_command

NETWORK = """
    --model.backbone convnext_atto --model.stem conv --model.conceal false --model.image_size 32
    --optimizer.name muon --optimizer.lr 2e-2 --optimizer.warmup_epochs 0.2 --ema_decay 0.998
    --batch_size 256 --objective.label_smoothing 0.1 --data.validation_limit 500
"""
BACKBONE = "{patch_size: 2, kernel_sizes: 3, ls_init_value: 0.1}"
ONE_STEP = "--objective.steps 1 --objective.noise 2 --objective.clip false"
OBJECTIVES = {
    "standard": "--objective.name standard",
    "challenge": "--objective.name challenge --data.augmentation challenge",
    "N-FGSM 8/255": f"--objective.name adversarial --objective.step_size 8/255 {ONE_STEP}",
    "TRADES": f"--objective.name trades --objective.step_size 8/255 {ONE_STEP}",
    "N-FGSM 2/255": f"""
        --objective.name adversarial --objective.epsilon 2/255 --objective.step_size 2/255
        {ONE_STEP}
    """,
}
"""Options of train.py by objective."""
RESIZE = {"min_size": 27, "seed": 0}
DEFENCES: dict[str, dict[str, object]] = {
    "none": {"conceal": False, "randomize": None},
    "GCM": {"conceal": True, "randomize": None},
    "resize-and-pad": {"conceal": False, "randomize": RESIZE},
    "GCM and resize-and-pad": {"conceal": True, "randomize": RESIZE},
}
"""Arguments in config.json by defence."""
TRN_EPOCHS = 2
PARTS = ("clean", "corrupted", "black_box", "white_box", "adaptive", "score", "adaptive_score")


@dataclass(kw_only=True)
class Options:
    """What to train and to score."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    out: Path
    """The table, in Markdown."""
    objectives: Names = Names(tuple(OBJECTIVES))
    """The networks' objectives."""
    defences: Names = Names(tuple(DEFENCES))
    """What is put in front of each."""
    trn: Names = Names()
    """Objectives for which a TRN is trained too."""
    folder: Path = Path("runs/leaderboard")
    """Where the run folders go."""
    train: int = 20000
    """Training images, stratified by class; a tenth of them validates."""
    epochs: int = 6
    """Of each network."""
    limit: int = 200
    """Test images under attack."""
    draws: int = 5
    """Draws of attacks."""


def train(
    command: Words, output: Path, recipe: type[Recipe | TRNRecipe], weights: Path | None = None
) -> Path:
    """The run folder of a training command, which is run if its result is not there.

    That is a finished run by the same recipe, which began after `weights` were written.
    """
    command = [*command, "--output", output]
    if why := _missing(command, output, recipe, weights):
        print(f"{output}: trained, {why}.")
        run_command(command)
    else:
        print(f"{output}: taken as it is.")
    return output


def _missing(
    command: Words, output: Path, recipe: type[Recipe | TRNRecipe], weights: Path | None
) -> str | None:
    """Why the command is to be run; None if its result is there."""
    record, metrics = output / "recipe.yaml", output / "metrics.csv"
    if not record.exists() or not metrics.exists():
        return "no run is there"
    options = [str(word) for word in command[2:]]
    now = as_plain(parse(recipe, options, ROOT / "training/recipes/quickstart.yaml"))
    if difference := changed_key(read_recipe(output, "--folder"), now, MAY_CHANGE - {"root"}):
        return f"expected {difference}"
    if weights and weights.stat().st_mtime > record.stat().st_mtime:
        return f"{weights} is newer"
    finished = len(metrics.read_text().splitlines()) == 1 + now["epochs"]
    return None if finished else "the run there is not finished"


def trained(options: Options, objective: str) -> Path:
    """The run folder of the objective's network, which is trained if it is not there."""
    name = "".join(each if each.isalnum() else "_" for each in objective.lower())
    output = options.folder / name
    chosen = f"--data.limit {options.train} --epochs {options.epochs} --overwrite"
    call = python(f"training/train.py {NETWORK} {OBJECTIVES[objective]} {chosen}")
    data: Words = ["--data.name", "folder", "--data.root", options.images]
    return train([*call, *data, "--model.backbone_args", BACKBONE], output, Recipe)


def restoring(options: Options, checkpoint: Path) -> Path:
    """The run folder of a TRN for that network, which is trained if it is not there."""
    output = checkpoint.with_name(f"{checkpoint.name}_trn")
    recipe = "training/train_trn.py --config training/recipes/cifar10_trn.yaml --overwrite"
    size = f"--epochs {TRN_EPOCHS} --batch_size 64 --data.limit 6500 --data.validation_limit 300"
    call = python(f"{recipe} {size} --optimizer.warmup_epochs 0.3 --ema_decay 0.99")
    data: Words = ["--data.root", options.images, "--checkpoint", checkpoint]
    return train([*call, *data], output, TRNRecipe, checkpoint / "model.safetensors")


def defended(checkpoint: Path, arguments: Mapping[str, object]) -> Path:
    """A copy of a run folder with other arguments in its config.json: the same weights."""
    copy = checkpoint.with_name(f"{checkpoint.name}_defended")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("state", "logs"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | arguments))
    return copy


def scored(options: Options, checkpoint: Path, trn: Path | None) -> dict[str, dict[str, float]]:
    """By part, the mean of the draws and where one more draw may fall; shares from 0 to 1."""
    package, result = options.folder / "package.zip", options.folder / "score.json"
    made: Words = ["--checkpoint", checkpoint, *(["--trn", trn] if trn else [])]
    run_command([*python("submission/package.py"), *made, "--out", package])
    size = f"--limit {options.limit} --draws {options.draws}"
    run_command([*python(f"submission/score.py {size}"), package, *made, "--out", result])
    return json.loads(result.read_text())["score"]


def cell(part: Mapping[str, float]) -> str:
    """`61.3 [58.0, 64.6]`, percent; the mean alone of a single draw."""
    mean, low, high = (part[name] for name in ("mean", "low", "high"))
    bounds = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f}{bounds}"


def measure(options: Options) -> None:
    """Train, score, and write the table, again after each line."""
    check_writable(options.out)
    known = {"objectives": OBJECTIVES, "defences": DEFENCES, "trn": OBJECTIVES}
    for name, choices in known.items():
        if unknown := sorted(set(getattr(options, name)) - set(choices)):
            raise UserError(f"--{name}: expected {', '.join(choices)}, found {unknown[0]}.")
    columns = ("objective", "defence", *(part.replace("_", " ") for part in PARTS))
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for objective in options.objectives:
        checkpoint = trained(options, objective)
        names = [*options.defences, *(["GCM and TRN"] if objective in options.trn else [])]
        for name in names:
            arguments = DEFENCES[name.removesuffix(" and TRN")]
            trn = restoring(options, checkpoint) if name.endswith("TRN") else None
            found = scored(options, defended(checkpoint, arguments), trn)
            lines.append(" | ".join([objective, name, *(cell(found[part]) for part in PARTS)]))
            with atomic_write(options.out) as temporary:
                temporary.write_text("".join(f"| {line} |\n" for line in lines))


if __name__ == "__main__":
    run(measure, Options)
