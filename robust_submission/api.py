"""Evaluates a model from Python; `inference/evaluate.py` does the same from the command line.

from robust_submission import evaluate
report = evaluate(model, images, labels, attacks=("fgsm", "pgd"), epsilon=8 / 255)
report.oblivious.value, report.adaptive.value
"""

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_submission.attacks import ATTACKS, Model
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.numbers import duration
from robust_submission.cli.progress import WorkBar
from robust_submission.data.corruptions import CORRUPTIONS, corruption_names
from robust_submission.data.gather import from_all_processes
from robust_submission.data.loader import micro_batch_size
from robust_submission.data.sources import match_classes
from robust_submission.evaluation.batch import ChunkEvaluator
from robust_submission.evaluation.cache import (
    Journal,
    code_digest,
    digest,
    model_digest,
)
from robust_submission.evaluation.chunks import FittingBatches
from robust_submission.evaluation.data import EvaluationData, TensorSource, arrange_images
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.plan import plan_jobs, planted_images
from robust_submission.evaluation.results import Results
from robust_submission.evaluation.runner import Runner
from robust_submission.evaluation.views import Views, build_views, try_model
from robust_submission.models.digest import source_digest
from robust_submission.models.load import LoadedModel
from robust_submission.report.build import ReportBuilder, describe_model
from robust_submission.report.schema import Report
from robust_submission.runtime import provenance, repeatable
from robust_submission.settings import EvaluationSettings, NormName

CODE = Path(__file__).parent


def evaluate(
    model: Model,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    attacks: str | Sequence[str] = ("fgsm", "pgd"),
    norm: NormName = "linf",
    epsilon: float | Sequence[float] = 8 / 255,
    steps: int = 20,
    draws: int = 5,
    eot: int = 10,
    curves: bool = True,
    curve_images: int | None = None,
    corruptions: str | Sequence[str] = (),
    seed: int = 0,
    twin: Model | None = None,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    out: Path | str | None = None,
) -> Report:
    """Attack a model as the oblivious, the adaptive and the transfer attacker, and report.

    The model is copied: it keeps its mode, device and `requires_grad`, as the global random states
    keep theirs. What is not an `nn.Module` is called as it is. Runs on the device of the model's
    parameters, or on that of the images if it has none.

    Args:
        model: Any callable from images (B, 3, S, S), float32, RGB, 0 to 1, to logits
            (B, num_classes), best an `nn.Module`: the defences in one are found and revealed.
        images: (N, 3, S, S), RGB, floating point from 0 to 1 or uint8.
        labels: (N,), integers from 0.
        attacks: fgsm, ffgsm, bim, mim, pgd, cw (L2), fmn (Linf, L1), ddn (L2), autoattack or one of
            its parts: apgd-ce, apgd-t, apgd-dlr, fab, fab-t, square; screen (Linf, L2), its fast
            stand-in on honest models. Noise and a transfer attack are added.
        norm: The norm that epsilon bounds.
        epsilon: One radius or several, in pixel values from 0 to 1; the headline numbers are for
            the first.
        steps: Steps of bim, mim and pgd.
        draws: Draws of a random model that are scored.
        eot: Draws of a random model that an adaptive attack averages over.
        curves: Also measure accuracy against epsilon and against steps.
        curve_images: How many images the curves use; None for a tenth, at least 32, at most 100.
        corruptions: Also measure accuracy on corrupted images, each kind at severities 1 to 5:
            "all", or names of `data.corruptions.CORRUPTIONS`. Images are rounded to 8 bits first.
        seed: Seed of every random draw.
        twin: A model to transfer from, of the same classes and images; None for the model itself
            without its defences.
        class_names: Names in label order, matched with the model's if it has any; None for the
            model's `class_names`, or numbers.
        name: What the report calls the model; None for the name of its class.
        out: A folder for report.html, report.json, per_image.csv and plots, and for continuing an
            interrupted evaluation; None writes no file.

    Raises:
        UserError: an argument of another type, shape or range, an unknown attack, or a model that
            fails on the images.
    """
    settings = EvaluationSettings(
        attacks=_names("attacks", attacks, ATTACKS),
        norm=norm,
        epsilon=tuple(_number("epsilon", each, float) for each in _several(epsilon)),
        steps=_number("steps", steps, int),
        draws=_number("draws", draws, int),
        eot=_number("eot", eot, int),
        curves=curves,
        corruptions=corruption_names(_names("corruptions", corruptions, CORRUPTIONS)),
        seed=_number("seed", seed, int),
    )
    if (
        curve_images is not None
        and (curve_images := _number("curve_images", curve_images, int)) < 1
    ):
        raise UserError(f"curve_images: expected at least 1, or None, found {curve_images}.")
    class_names = None if class_names is None else [str(name) for name in class_names]
    options = {**asdict(settings), "curve_images": curve_images}
    del options["seed"]  # a field of the report
    source = TensorSource(images, labels)
    size = source.images.shape[-1]
    own = images.device if isinstance(images, Tensor) else torch.device("cpu")
    device = next((each.device for each in _tensors(model)), own)
    cuda = device.type == "cuda"
    with (
        unchanged_random_state(),
        repeatable() if cuda else nullcontext(),
        torch.inference_mode(False),  # in which nothing has a gradient
    ):
        model, twin = copied(model), copied(twin)
        for argument, each in (("images", model), ("images of the twin", twin)):
            side = getattr(each, "image_size", None)
            if isinstance(side, int) and side != size:
                raise UserError(f"{argument}: expected a side of {side}, found {size}.")
        named = LoadedModel(
            name=name or getattr(model, "__name__", type(model).__name__),
            model=model,
            image_size=size,
            class_names=getattr(model, "class_names", None),
        )
        count = min(2, len(source))  # some models need more than one
        first = source.micro_batch(np.arange(count), count)["images"].to(device)
        outputs = try_model(named.name, model, first)
        numbers = [str(number) for number in range(outputs.shape[1])]
        source.name_classes(class_names or named.class_names or numbers, named.class_names)
        everything = np.arange(len(source))
        about = {"source": "tensors", "part": "all", "images": len(source), "of": len(source)}
        data = arrange_images(source, everything, curve_images, seed, about | {"chosen": "all"})
        _require_classes(getattr(twin, "class_names", None), data)
        few = data.first_images(named.image_size)
        views = build_views(named, twin, few, data.class_names, device, settings)
        return run_evaluation(
            views, data, settings, options, out=None if out is None else Path(out)
        )


def run_evaluation(
    views: Views,
    data: EvaluationData,
    settings: EvaluationSettings,
    options: dict[str, Any],
    *,
    out: Path | None,
    accelerator: Accelerator | None = None,
    compiled: Views | None = None,
    save: Callable[[Results, Report], None] | None = None,
) -> Report:
    """Run the evaluation that `evaluate` and `inference/evaluate.py` prepare.

    Args:
        views: The model and what each attacker differentiates.
        data: The images.
        settings: How to attack.
        options: What the report gives as its settings.
        out: A folder for the report and for continuing; None writes no file.
        accelerator: The processes that share the work, each of which calls this; None for one.
        compiled: `views.compiled`, to predict and attack with; None for `views` themselves.
        save: Called in the main process with results that hold the adversarial images, after the
            report is written and before the means for continuing are removed.

    Raises:
        UserError: an attack that the model or the norm does not allow, an image that cannot be
            read, a file that cannot be written, or too little memory for one image.
    """
    plan, model = plan_jobs(settings, views), describe_model(views)
    if any(each != plan for each in from_all_processes(accelerator, [plan])):
        expected = "the same behaviour in each process, found that they plan other attacks"
        raise UserError(f"{views.name}: expected {expected}; run it in one process.")
    main = accelerator is None or accelerator.is_main_process
    about = _journal_settings(views, data, settings) if out else {}
    kept_apart = {"images kept": save is not None, "compiled": compiled is not None}
    journal = Journal(out / ".journal", about | kept_apart) if out else None
    if journal and main:
        journal.prepare()
    if accelerator:
        accelerator.wait_for_everyone()
    fit = FittingBatches(micro_batch_size(views.image_size))
    bar = WorkBar(hidden=not main)
    kept = plan.headline_runs() if save else frozenset()
    evaluator = ChunkEvaluator(views, settings, fit, bar.tick, kept)
    cost = evaluator.planted_passes(plan.planted) if plan.planted else 0
    runner = Runner(
        evaluator=evaluator,
        data=data,
        plan=plan,
        corruptions=corruption_names(settings.corruptions),
        planted=planted_images(plan, cost, len(data.indices), data.curve_images),
        image_size=views.image_size,
        device=views.device,
        accelerator=accelerator,
        journal=journal,
        keeps=save is not None,
        bar=bar,
    )
    if main and log.isEnabledFor(logging.INFO):
        few = replace(data, num_workers=0).first_images(views.image_size)
        longest = duration(runner.expected() * evaluator.seconds_per_pass(few))
        log.info("%s; at most about %s", runner.summary(), longest)
    evaluator.views = compiled or views  # not before the estimate, which would count compiling
    results = runner.run()
    built = ReportBuilder(model=model, results=results, views=views, data=data, settings=settings)
    report = built.report(options)
    if out and main:
        from robust_submission.report.write import write_report  # matplotlib takes a second

        write_report(report, built.pictures(), built.per_image_table(), out)
    if save and main:
        save(results, report)
    if journal and main:
        journal.remove()
    return report


def _journal_settings(
    views: Views, data: EvaluationData, settings: EvaluationSettings
) -> dict[str, Any]:
    """Everything that decides the results of a job on a chunk, under names that a user knows."""
    some = torch.zeros(2, 3, views.image_size, views.image_size, device=views.device)
    of_data = [data.indices.tobytes(), data.labels.tobytes(), "\n".join(data.source.ids).encode()]
    # "package.module:function": what it imports can decide more than the model shows.
    places = (views.name.rpartition(":")[0], getattr(views.model, "__module__", None) or "")
    code = next(filter(None, map(source_digest, places)), "")
    return {
        "version": code_digest(CODE),
        "packages": provenance()["packages"],
        "model": [code and views.name, code, model_digest(views.model, some)],
        "twin": model_digest(views.seen_by.get(Attacker.TRANSFER), some),
        "data": digest(of_data),
        "curve_images": data.curve_images,
        "image_size": views.image_size,
        "norm and epsilon": [settings.norm, settings.epsilon[0]],
        "seed": settings.seed,
        "draws": [settings.draws if views.random else 1, settings.eot],
    }


def copied(model: Any) -> Any:
    """A copy of a module in eval mode, to be changed freely; anything else as it is.

    Raises:
        UserError: the module holds what cannot be copied.
    """
    if not isinstance(model, nn.Module):
        return model
    kept = [each for part in model.modules() for each in vars(part).values()]
    results = [each for each in kept if isinstance(each, Tensor) and not each.is_leaf]
    try:  # deepcopy refuses results of autograd, such as a pruned weight; TorchScript makes some
        with torch.no_grad():
            known = {id(each): each.detach().clone() for each in results}
            return copy.deepcopy(model, known).eval()
    except Exception as error:  # whatever a part of it raises
        expected = "a module that can be copied, or a function that calls it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{type(model).__name__}: expected {expected}, found: {reason}") from error


def _require_classes(names: Sequence[str] | None, data: EvaluationData) -> None:
    """Raise UserError if the twin numbers the data's classes otherwise."""
    if names is None:
        return
    labels, _ = match_classes(data.labels, data.class_names, names, "twin")
    if len(names) != len(data.class_names) or not np.array_equal(labels, data.labels):
        expected = f"the {len(data.class_names)} classes of the evaluated model in their order"
        raise UserError(f"twin: expected {expected}, found others.")


def _several(values: Any) -> list[Any]:
    """A single value as a list of one, several as a list."""
    return np.asarray(values).reshape(-1).tolist()


def _names(argument: str, values: Any, known: Iterable[str]) -> tuple[str, ...]:
    """One name or several; UserError where something else is given."""
    several = isinstance(values, Iterable) and not isinstance(values, str)
    names: tuple[Any, ...] = tuple(values) if several else (values,)
    if others := [each for each in names if not isinstance(each, str)]:
        raise UserError(f"{argument}: expected some of {', '.join(known)}, found {others[0]!r}.")
    return names


def _number(name: str, value: Any, kind: type[Any]) -> Any:
    """The value as Python's float or int; UserError where it is none."""
    try:
        number = kind(value)
        if number == value:
            return number
    except (TypeError, ValueError):
        pass
    expected = "a number" if kind is float else "a whole number"
    raise UserError(f"{name}: expected {expected}, found {value!r}.")


def _tensors(model: Model) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Restore the global random states of Python, numpy and torch at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
