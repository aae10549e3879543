"""The checks: what each expects, what the trial found, and how to fix it."""

from collections.abc import Iterator
from math import sqrt

import numpy as np

from robust_submission.checker.host import Rules, Trial
from robust_submission.checker.probes import Counter, ProbeError, Stage, TrialResult
from robust_submission.checker.table import RuleResult
from robust_submission.checker.unpack import needless

SAME = 1e-4  # outputs this close, as a share of the largest, count as equal


def check_trial(trial: Trial, rules: Rules) -> list[RuleResult]:
    """Every verdict that the trial allows, in the order in which one would fix the faults."""
    if (refused := trial.refused) is not None:
        return [_verdict("archive", False, refused.expected, refused.found, refused.fix)]
    verdicts = [_archive(trial.files)] if trial.kind == ".zip" else []
    verdicts.append(_ending(trial, rules))
    if (result := trial.result) is not None and result.loaded:
        verdicts += _size(result, rules)
        verdicts += _interface(result, rules)
        verdicts += _outputs(result, rules)
        verdicts += _stability(result)
        if Stage.REACTIONS not in result.errors:
            verdicts += _encoding(trial, result)
    return verdicts + _trust(trial)


def _verdict(check: str, good: bool | None, expected: str, found: str, fix: str) -> RuleResult:
    """`good` is None for a note; a passed check needs no fix."""
    status, fix = ("pass", "") if good else ("note" if good is None else "fail", fix)
    return RuleResult(check=check, status=status, expected=expected, found=found, fix=fix)


def _words(error: ProbeError | None) -> str:
    if error is None:
        return "nothing"
    place = f" ({error.place})" if error.place else ""
    return f"{error.kind}: {error.message}{place}"


def _archive(files: list[str]) -> RuleResult:
    if extra := needless(files):
        found = f"{len(extra)} needless: {extra[0]}"
        fix = "leave out what the model does not read"
        return _verdict("archive", None, "only what the model reads", found, fix)
    found = ", ".join(sorted(files)[:4])
    return _verdict("archive", True, "model.py at the top level, safe paths", found, "")


def _ending(trial: Trial, rules: Rules) -> RuleResult:
    """Whether the model loaded and the trial came to its end."""
    run, result, limits = trial.run, trial.result, rules.limits
    assert run is not None
    found = f"{run.found}, while {run.stage}"
    if run.end == "late":
        fix = "look for an endless loop or a very slow model, or raise --timeout"
        return _verdict("time", False, f"an end within {limits.seconds:g} s", found, fix)
    errors = result.errors.values() if result else ()
    if run.end == "killed" or any(error.kind == "MemoryError" for error in errors):
        expected = f"at most {limits.memory / 1e9:g} GB of memory"
        found = found if run.end == "killed" else f"more requested, while {run.stage}"
        return _verdict("memory", False, expected, found, "use less memory, or raise --memory")
    if result is None:
        found += f": {(run.output.strip().splitlines() or [''])[-1]}"
        fix = "do not end the process, nor write its result"
        return _verdict("loading", False, "Model() to load and run", found, fix)
    if result.contacts:
        fix = "put everything that the model reads into the zip"
        return _verdict(
            "network", False, "no use of a network", f"a call to {result.contacts[0]}", fix
        )
    return _loading(trial, result, rules)


def _loading(trial: Trial, result: TrialResult, rules: Rules) -> RuleResult:
    expected = "a class Model that takes no arguments"
    if trial.kind == ".onnx":
        expected = "one file that onnx and onnxruntime accept"
    if result.loaded:
        return _verdict("loading", True, expected, f"loaded; all in {trial.seconds:.0f} s", "")
    error = result.errors.get(Stage.LOAD)
    kind, found = error.kind if error else "", _words(error)
    fix = "run `from model import Model; Model()` and fix it"
    if error and kind == "ModuleNotFoundError":
        module = error.module.split(".")[0]
        fix = f"write out in model.py what {module} does, or submit ONNX (package.py --out x.onnx)"
        found = f"needs {module} ({error.place})"
        return _verdict("packages", False, f"{' and '.join(rules.packages)} alone", found, fix)
    if error and kind == "ContractError":
        found, fix = error.message, "define class Model(torch.nn.Module) in model.py"
    if kind == "FileNotFoundError":
        fix = "open files relative to os.path.dirname(__file__), and pack them"
    return _verdict("loading", False, expected, found, fix)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e4 else f"{number:g}"


def _size(result: TrialResult, rules: Rules) -> Iterator[RuleResult]:
    """Parameters and operations."""
    total, trainable = result.parameters, result.trainable
    expected = f"fewer than {rules.max_parameters / 1e6:g} M"
    if total is None:
        found = _words(result.errors.get(Stage.PARAMETERS))
        yield _verdict("parameters", False, expected, found, "see the error")
    else:
        good, found = total < rules.max_parameters, _millions(total)
        yield _verdict("parameters", good, expected, found, "take a smaller network")
        if trainable is not None:
            found = f"{_millions(trainable)} of {_millions(total)}"
            fix = "leave requires_grad on for one parameter: DistributedDataParallel needs it"
            yield _verdict("trainable", trainable > 0, "at least one parameter", found, fix)
    yield _operations(result, rules)


def _operations(result: TrialResult, rules: Rules) -> RuleResult:
    """The largest of the counts: ptflops does not see every product."""
    expected = f"fewer than {rules.max_operations / 1e9:g} G multiply-adds"
    if not result.operations:
        stages = (Stage.OPERATIONS, Stage.PTFLOPS, Stage.OUTPUTS)
        errors = [_words(result.errors[stage]) for stage in stages if stage in result.errors]
        found = errors[0] if errors else "not counted"
        return _verdict("operations", False, expected, found, "see the error")
    labels: dict[Counter, str] = {
        "graph": "in the graph",
        "ptflops": "by ptflops",
        "dispatched": "run by torch",
    }
    counts = [(result.operations.get(name), label) for name, label in labels.items()]
    found = ", ".join(
        f"{count / 1e9:.3g} G {label}" for count, label in counts if count is not None
    )
    if result.uncounted:
        found += f"; not counted: {', '.join(result.uncounted)}"
    good = max(result.operations.values()) < rules.max_operations
    fix = "take a smaller network or input; a backward pass inside the model counts too"
    return _verdict("operations", good, expected, found, fix)


def _interface(result: TrialResult, rules: Rules) -> Iterator[RuleResult]:
    """The input of an ONNX model."""
    face, wanted = result.interface, (3, rules.image_size, rules.image_size)
    expected = f"one float32 input, N x {' x '.join(map(str, wanted))}"
    fix = "export with one float32 image batch as input"
    if face is not None:
        pairs = zip(face.shape[1:], wanted, strict=False)
        fits = all(isinstance(side, str) or side == fixed for side, fixed in pairs)
        good = fits and len(face.shape) == 4 and face.inputs == 1 and face.float32
        found = f"{face.inputs} input, {' x '.join(map(str, face.shape))}, opset {face.opset}"
        yield _verdict("input", good, expected, found, fix)
    elif error := result.errors.get(Stage.INTERFACE):
        yield _verdict("input", False, expected, _words(error), fix)


def _outputs(result: TrialResult, rules: Rules) -> Iterator[RuleResult]:
    """Shape, type and values."""
    outputs = result.outputs
    expected = f"2 x {rules.num_classes} for 2 images of {rules.image_size} px"
    if outputs is None:
        fix = "accept a float tensor N x 3 x H x W and return a tensor"
        yield _verdict("output", False, expected, _words(result.errors.get(Stage.OUTPUTS)), fix)
        return
    good, found = outputs.shape == [2, rules.num_classes], " x ".join(map(str, outputs.shape))
    fix = "return one logit per class, or set --num_classes"
    yield _verdict("output", good, expected, found or "a single number", fix)
    good, found = outputs.dtype == "float32", outputs.dtype
    yield _verdict("type", good, "float32", found, "end forward with .float()")
    finite = outputs.finite and (result.reactions is None or result.reactions.finite)
    where = "for all black or all white" if finite else "for images"
    found = "finite" if finite and outputs.extremes else f"NaN or infinity {where}"
    if error := result.errors.get(Stage.REACTIONS):
        found = _words(error)
    fix = "look for a division by zero or a float16 overflow"
    yield _verdict("values", found == "finite", "finite, black and white images too", found, fix)
    found = "probabilities that sum to 1" if outputs.probabilities else "logits"
    good, fix = not outputs.probabilities, "remove the softmax"
    yield _verdict("logits", good, "logits, no softmax", found, fix)


def _stability(result: TrialResult) -> Iterator[RuleResult]:
    """Outputs must not change with the call, the batch or the mode."""
    moved, error = result.repeat, result.errors.get(Stage.STABILITY)
    fix = "draw from the image's own pixels or a fixed seed, not from a global generator"
    yield from _unmoved("repeat", moved, error, "the same outputs in every call", fix)
    fix = "no statistics over the batch: eval mode inside, or GroupNorm or LayerNorm"
    yield from _unmoved("batch", result.batch, error, "the same outputs alone as in a batch", fix)
    moved, error = result.modes, result.errors.get(Stage.MODES)
    fix = "eval() may not be called: use no dropout, and keep batch norms in eval mode"
    yield from _unmoved("modes", moved, error, "the same outputs in train and eval mode", fix)
    error = result.errors.get(Stage.DISTRIBUTED)
    if result.distributed or error is not None:
        found = "runs" if error is None else _words(error)
        fix = "see trainable; no tensors outside parameters and buffers"
        yield _verdict("parallel", error is None, "runs under DDP and DataParallel", found, fix)


def _unmoved(
    check: str, moved: float | None, error: ProbeError | None, expected: str, fix: str
) -> Iterator[RuleResult]:
    """A verdict on outputs that should not differ; none if they were not compared."""
    if error is not None:
        yield _verdict(check, False, expected, _words(error), fix)
    elif moved is not None:
        found = f"differ by at most {moved:.0e} of the largest"
        yield _verdict(check, moved <= SAME, expected, found, fix)


def _better(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `second` is right more often by two deviations of the images they disagree on."""
    gain, loss = int((second & ~first).sum()), int((first & ~second).sum())
    return gain - loss > 2 * sqrt(max(gain + loss, 1))


def _encoding(trial: Trial, result: TrialResult) -> Iterator[RuleResult]:
    """Range and order of the channels, by the accuracy on labelled images."""
    seen, labels = result.reactions, trial.images and trial.images.labels
    unit, order = "images in 0 to 1", "channels in order BGR"
    fix = "give --images, a folder with labels and colours"
    if seen is None or labels is None:
        yield _verdict("range", None, unit, "not checked", "give --images, a folder with labels")
        yield _verdict("channels", None, order, "not checked", fix)
        return
    bgr, rgb, bgr255 = (np.array(each) == labels for each in (seen.bgr, seen.rgb, seen.bgr255))
    found = f"accuracy {bgr.mean():.1%} in 0 to 1, {bgr255.mean():.1%} in 0 to 255"
    good = not _better(bgr, bgr255)
    yield _verdict("range", good, unit, found, "do not divide by 255 in the model")
    found = f"accuracy {bgr.mean():.1%} as BGR, {rgb.mean():.1%} as RGB"
    if seen.grey:
        yield _verdict("channels", None, order, "not checked: the images are grey", fix)
    elif _better(bgr, rgb) or _better(rgb, bgr):
        fix = "flip them first: images = images.flip(1)"
        yield _verdict("channels", _better(rgb, bgr), order, found, fix)
    else:
        yield _verdict("channels", None, order, f"{found}: no clear difference", fix)


def _trust(trial: Trial) -> list[RuleResult]:
    """What was not prevented, and what to do about code of others."""
    assert trial.run is not None
    if trial.kind == ".onnx" or trial.run.walls == "container":
        return []
    found = [f"code of others, {trial.strange[0]}"] if trial.strange else []
    if trial.run.walls == "none":
        found.append("Linux refused namespaces: its network and processes were in reach")
    fix = "check what you distrust with --container"
    expected = "code of package.py, or a container"
    return [_verdict("trust", None, expected, "; ".join(found), fix)] if found else []
