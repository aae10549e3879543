"""The checks: what each expects, what the trial found, and how to fix it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from robust_submission.checker.host import STAGES, Rules, Trial
from robust_submission.checker.result import Counter, ProbeError, Stage, TrialResult
from robust_submission.checker.unpack import needless

SAME = 1e-4  # outputs this close, as a share of the largest, count as equal


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One check's line in the table."""

    check: str
    status: Literal["pass", "fail", "note"]
    expected: str
    found: str
    fix: str = ""


def check_trial(trial: Trial, rules: Rules) -> list[Verdict]:
    """Every verdict that the trial allows, in the order in which one would fix the faults."""
    if (refused := trial.refused) is not None:
        return [_fail("archive", refused.expected, refused.found, refused.fix)]
    return [*_check_run(trial, rules), *_check_result(trial, rules)]


def _check_run(trial: Trial, rules: Rules) -> Iterator[Verdict]:
    if trial.kind == ".zip":
        yield _archive(trial.files)
    yield _ending(trial, rules)


def _check_result(trial: Trial, rules: Rules) -> Iterator[Verdict]:
    result = trial.result
    if result is None or not result.loaded:
        return
    yield _parameters(result, rules)
    yield from _trainable(result)
    yield _operations(result, rules)
    yield from _interface(result, rules)
    yield _shape(result, rules)
    yield from _outputs(result)
    yield from _stability(result)
    yield from _distributed(result)
    if "reactions" not in result.errors:
        yield from _encoding(trial)


def _decide(check: str, good: bool, expected: str, found: str, fix: str) -> Verdict:
    if good:
        return Verdict(check=check, status="pass", expected=expected, found=found)
    return _fail(check, expected, found, fix)


def _fail(check: str, expected: str, found: str, fix: str) -> Verdict:
    return Verdict(check=check, status="fail", expected=expected, found=found, fix=fix)


def _note(check: str, expected: str, found: str, fix: str) -> Verdict:
    return Verdict(check=check, status="note", expected=expected, found=found, fix=fix)


def _words(error: ProbeError | None) -> str:
    if error is None:
        return "nothing"
    place = f" ({error.place})" if error.place else ""
    return f"{error.kind}: {error.message}{place}"


def _archive(files: list[str]) -> Verdict:
    if extra := needless(files):
        found = f"{len(extra)} needless: {extra[0]}"
        fix = "leave out what the model does not read"
        return _note("archive", "only what the model reads", found, fix)
    found = ", ".join(sorted(files)[:4])
    return _decide("archive", True, "model.py at the top level, safe paths", found, "")


def _ending(trial: Trial, rules: Rules) -> Verdict:
    """Whether the model loaded and the trial came to its end."""
    run, result, limits = trial.run, trial.result, rules.limits
    assert run is not None
    words: dict[str, str] = {**STAGES}
    during = f"while {words.get(run.stage, run.stage)}"
    if run.end == "late":
        fix = "look for an endless loop or a model far too slow, or raise --timeout"
        return _fail("time", f"an end within {limits.seconds:g} s", f"{run.found}, {during}", fix)
    errors = result.errors.values() if result else ()
    if run.end == "killed" or any(error.kind == "MemoryError" for error in errors):
        expected = f"at most {limits.memory / 1e9:g} GB of memory"
        found = f"{run.found if run.end == 'killed' else 'more requested'}, {during}"
        return _fail("memory", expected, found, "use less memory, or raise --memory")
    if result is None:
        last = (run.output.strip().splitlines() or [""])[-1]
        found = f"{run.found}, {during}: {last}"
        fix = "do not end the process, nor write its result"
        return _fail("loading", "Model() to load and run", found, fix)
    if result.contacts:
        found = f"a call to {result.contacts[0]}"
        return _fail("network", "no network", found, "put all that the model reads in the zip")
    return _loading(trial, result, rules)


def _loading(trial: Trial, result: TrialResult, rules: Rules) -> Verdict:
    expected = "a class Model that takes no arguments"
    if trial.kind == ".onnx":
        expected = "one file that onnx and onnxruntime accept"
    if result.loaded:
        return _decide("loading", True, expected, f"loaded; all in {trial.seconds:.0f} s", "")
    error = result.errors.get("load")
    if error and error.kind == "ModuleNotFoundError":
        module = error.module.split(".")[0]
        fix = f"write out in model.py what {module} does, or submit ONNX (package.py --out x.onnx)"
        found = f"needs {module} ({error.place})"
        return _fail("packages", f"{' and '.join(rules.packages)} alone", found, fix)
    if error and error.kind == "ContractError":
        fix = "define class Model(torch.nn.Module) in model.py"
        return _fail("loading", expected, error.message, fix)
    fix = "run `from model import Model; Model()` and fix it"
    if error and error.kind == "FileNotFoundError":
        fix = "open files relative to os.path.dirname(__file__), and pack them"
    return _fail("loading", expected, _words(error), fix)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e4 else f"{number:g}"


def _parameters(result: TrialResult, rules: Rules) -> Verdict:
    expected = f"fewer than {rules.max_parameters / 1e6:g} M"
    if result.parameters is None:
        return _fail(
            "parameters", expected, _words(result.errors.get("parameters")), "see the error"
        )
    total = result.parameters.total
    good = total < rules.max_parameters
    return _decide("parameters", good, expected, _millions(total), "take a smaller network")


def _trainable(result: TrialResult) -> Iterator[Verdict]:
    if result.parameters is not None and (trainable := result.parameters.trainable) is not None:
        fix = "leave requires_grad on for one parameter: DistributedDataParallel needs it"
        found = f"{_millions(trainable)} of {_millions(result.parameters.total)}"
        yield _decide("trainable", trainable > 0, "at least one parameter", found, fix)


def _operations(result: TrialResult, rules: Rules) -> Verdict:
    """The largest of the counts: ptflops does not see every product."""
    expected = f"fewer than {rules.max_operations / 1e9:g} G multiply-adds"
    if not result.operations:
        stages: tuple[Stage, ...] = ("dispatched", "ptflops", "graph", "outputs")
        errors = [_words(result.errors[stage]) for stage in stages if stage in result.errors]
        return _fail("operations", expected, (errors or ["not counted"])[0], "see the error")
    labels: dict[Counter, str] = {
        "graph": "in the graph",
        "ptflops": "by ptflops",
        "dispatched": "run by torch",
    }
    counts = [(label, result.operations.get(name)) for name, label in labels.items()]
    found = ", ".join(
        f"{count / 1e9:.3g} G {label}" for label, count in counts if count is not None
    )
    if result.uncounted:
        found += f"; not counted: {', '.join(result.uncounted)}"
    good = max(result.operations.values()) < rules.max_operations
    fix = "take a smaller network or input; a backward pass inside the model counts too"
    return _decide("operations", good, expected, found, fix)


def _interface(result: TrialResult, rules: Rules) -> Iterator[Verdict]:
    """The input of an ONNX model."""
    face, side = result.interface, rules.image_size
    expected = f"one float32 input, N x 3 x {side} x {side}"
    fix = "export with one float32 image batch as input"
    if face is not None:
        free_or_equal = [
            not isinstance(found, int) or found == wanted
            for found, wanted in zip(face.shape[1:], (3, side, side), strict=False)
        ]
        good = len(face.shape) == 4 and all(free_or_equal) and face.inputs == 1 and face.float32
        found = f"{face.inputs} input, {' x '.join(map(str, face.shape))}, opset {face.opset}"
        yield _decide("input", good, expected, found, fix)
    elif "interface" in result.errors:
        yield _fail("input", expected, _words(result.errors["interface"]), fix)


def _shape(result: TrialResult, rules: Rules) -> Verdict:
    expected = f"2 x {rules.num_classes} for 2 images of {rules.image_size} px"
    if result.outputs is None:
        fix = "take a float tensor N x 3 x H x W, give a tensor"
        return _fail("output", expected, _words(result.errors.get("outputs")), fix)
    found = " x ".join(map(str, result.outputs.shape)) or "a single number"
    good = result.outputs.shape == [2, rules.num_classes]
    return _decide(
        "output", good, expected, found, "give one logit per class, or set --num_classes"
    )


def _outputs(result: TrialResult) -> Iterator[Verdict]:
    """Type and values."""
    if (outputs := result.outputs) is None:
        return
    good = outputs.dtype == "float32"
    yield _decide("type", good, "float32", outputs.dtype, "end forward with .float()")
    finite = outputs.finite and (result.reactions is None or result.reactions.finite)
    where = "for all black or all white" if finite else "for images"
    found = "finite" if finite and outputs.extremes else f"NaN or infinity {where}"
    if error := result.errors.get("reactions"):
        found = _words(error)
    expected = "finite, black and white images too"
    fix = "look for a division by zero or a float16 overflow"
    yield _decide("values", found == "finite", expected, found, fix)
    found = "probabilities that sum to 1" if outputs.probabilities else "logits"
    good = not outputs.probabilities
    yield _decide("logits", good, "logits, no softmax", found, "leave out the softmax")


def _stability(result: TrialResult) -> Iterator[Verdict]:
    """Outputs must not change with the call, the batch or the mode."""
    repeat = result.stability and result.stability.repeat
    expected = "the same outputs in every call"
    fix = "draw from the image's own pixels or a fixed seed, not from a global generator"
    yield from _unmoved("repeat", repeat, result.errors.get("stability"), expected, fix)
    batch = result.stability and result.stability.batch
    expected = "the same outputs alone as in a batch"
    fix = "no statistics over the batch: eval mode inside, or GroupNorm or LayerNorm"
    yield from _unmoved("batch", batch, result.errors.get("stability"), expected, fix)
    expected = "the same outputs in train and eval mode"
    fix = "nobody promises eval(): no dropout, and batch norms that stay in eval mode"
    yield from _unmoved("modes", result.modes, result.errors.get("modes"), expected, fix)


def _unmoved(
    check: str, moved: float | None, error: ProbeError | None, expected: str, fix: str
) -> Iterator[Verdict]:
    """A verdict on outputs that should not differ; none if they were not compared."""
    if error is not None:
        yield _fail(check, expected, _words(error), fix)
    elif moved is not None:
        found = f"differ by at most {moved:.0e} of the largest"
        yield _decide(check, moved <= SAME, expected, found, fix)


def _distributed(result: TrialResult) -> Iterator[Verdict]:
    error = result.errors.get("distributed")
    if result.distributed or error is not None:
        found = "runs" if error is None else _words(error)
        fix = "see trainable; no tensors outside parameters and buffers"
        yield _decide("parallel", error is None, "runs under DDP and DataParallel", found, fix)


def _hits(trial: Trial) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Which images are classified correctly as BGR, as RGB and in 0 to 255, each bool (N,)."""
    seen = trial.result and trial.result.reactions
    if trial.images is None or trial.images.labels is None or seen is None:
        return None
    labels = trial.images.labels
    return (
        labels == np.array(seen.bgr),
        labels == np.array(seen.rgb),
        labels == np.array(seen.bgr255),
    )


def _better(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `second` is right more often by two deviations of the images they disagree on."""
    gain, loss = int((second & ~first).sum()), int((first & ~second).sum())
    return gain - loss > 2 * sqrt(max(gain + loss, 1))


def _encoding(trial: Trial) -> Iterator[Verdict]:
    """Range and order of the channels, by the accuracy on labelled images."""
    wanted = ("images in 0 to 1", "channels in order BGR")
    fixes = (
        "give --images, a folder with labels",
        "give --images, a folder with labels and colours",
    )
    if (hits := _hits(trial)) is None:
        yield _note("range", wanted[0], "not checked", fixes[0])
        yield _note("channels", wanted[1], "not checked", fixes[1])
        return
    bgr, rgb, bgr255 = hits
    found = f"accuracy {bgr.mean():.1%} in 0 to 1, {bgr255.mean():.1%} in 0 to 255"
    good = not _better(bgr, bgr255)
    yield _decide("range", good, wanted[0], found, "do not divide by 255 in the model")
    found = f"accuracy {bgr.mean():.1%} as BGR, {rgb.mean():.1%} as RGB"
    assert trial.result is not None and trial.result.reactions is not None
    if trial.result.reactions.grey:
        yield _note("channels", wanted[1], "not checked: the images are grey", fixes[1])
    elif _better(bgr, rgb):
        yield _fail("channels", wanted[1], found, "flip them first: images = images.flip(1)")
    elif _better(rgb, bgr):
        yield _decide("channels", True, wanted[1], found, "")
    else:
        yield _note("channels", wanted[1], f"{found}: no clear difference", fixes[1])
