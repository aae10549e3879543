"""Verdicts on what comes out of a model: shape, range, steadiness, order of channels."""

from math import sqrt
from typing import Any

import numpy as np

from robust_submission.checker.host import Findings, Rules
from robust_submission.checker.verdict import Verdict, decide, error_words, fail

SAME = 1e-4  # outputs this close, as a share of the largest, are the same


def judge_outputs(findings: Findings, rules: Rules) -> list[Verdict | None]:
    """All that can be said of a model that was loaded; None for what does not apply."""
    results = findings.results
    verdicts = [_interface(results, rules), _shape(results, rules)]
    if "outputs" in results and not error_words(results["outputs"]):
        verdicts += [_type(results), _values(results), _logits(results)]
    verdicts += [_repeat(results), _batch(results), _modes(results), _distributed(results)]
    if "outputs" in results and not error_words(results.get("reactions")):
        verdicts += [_range(findings), _channels(findings)]
    return verdicts


def _interface(results: dict[str, Any], rules: Rules) -> Verdict | None:
    """An ONNX model's input."""
    if "interface" not in results:
        return None
    side = rules.image_size
    expected = f"one float32 input, N x 3 x {side} x {side}"
    fix = "export with one float32 image batch as input"
    if words := error_words(results["interface"]):
        return fail("input", expected, words, fix)
    face = results["interface"]
    shape = " x ".join(map(str, face["shape"]))
    fits = len(face["shape"]) == 4 and all(
        not isinstance(found, int) or found == wanted
        for found, wanted in zip(face["shape"][1:], (3, side, side), strict=True)
    )
    found = f"{face['inputs']} input, {shape}, opset {face['opset']}"
    good = fits and face["inputs"] == 1 and face["float32"]
    return decide("input", good, expected, found, fix)


def _shape(results: dict[str, Any], rules: Rules) -> Verdict:
    expected = f"2 x {rules.num_classes} for 2 images of {rules.image_size} px"
    outputs = results.get("outputs", {})
    if words := error_words(outputs) if outputs else "nothing":
        return fail("output", expected, words, "take a float tensor N x 3 x H x W, give a tensor")
    found = " x ".join(map(str, outputs["shape"])) or "a single number"
    good = outputs["shape"] == [2, rules.num_classes]
    return decide("output", good, expected, found, "give one logit a class, or set --num_classes")


def _type(results: dict[str, Any]) -> Verdict:
    found = results["outputs"]["dtype"]
    return decide("type", found == "float32", "float32", found, "end forward with .float()")


def _values(results: dict[str, Any]) -> Verdict:
    outputs = results["outputs"]
    finite = outputs["finite"] and results.get("reactions", {}).get("finite", True)
    good = finite and outputs["extremes"]
    where = "for images" if not finite else "for all black or all white"
    found = "finite" if good else f"NaN or infinity {where}"
    fix = "look for a division by zero or a float16 overflow"
    return decide("values", good, "finite, black and white images too", found, fix)


def _logits(results: dict[str, Any]) -> Verdict:
    good = not results["outputs"]["probabilities"]
    found = "logits" if good else "probabilities that sum to 1"
    return decide("logits", good, "logits, no softmax", found, "leave out the softmax")


def _moved(check: str, value: Any, expected: str, fix: str) -> Verdict | None:
    """A verdict on outputs that should not move; None where they were not compared."""
    if value is None:
        return None
    if words := error_words(value):
        return fail(check, expected, words, fix)
    found = f"differ by at most {value:.0e} of the largest"
    return decide(check, value <= SAME, expected, found, fix)


def _stability(results: dict[str, Any], name: str) -> Any:
    value = results.get("stability")
    return value.get(name, value) if isinstance(value, dict) else None


def _repeat(results: dict[str, Any]) -> Verdict | None:
    fix = "draw from the image's own pixels or a fixed seed, not from a global generator"
    expected = "the same outputs in every call"
    return _moved("repeat", _stability(results, "repeat"), expected, fix)


def _batch(results: dict[str, Any]) -> Verdict | None:
    fix = "no statistics over the batch: eval mode inside, or GroupNorm or LayerNorm"
    expected = "the same outputs alone as in a batch"
    return _moved("batch", _stability(results, "batch"), expected, fix)


def _modes(results: dict[str, Any]) -> Verdict | None:
    fix = "nobody promises eval(): no dropout, and batch norms that stay in eval mode"
    expected = "the same outputs in train and eval mode"
    return _moved("modes", results.get("modes"), expected, fix)


def _distributed(results: dict[str, Any]) -> Verdict | None:
    if "distributed" not in results:
        return None
    words = error_words(results["distributed"])
    fix = "see trainable; no tensors outside parameters and buffers"
    return decide("parallel", not words, "runs under DDP and DataParallel", words or "runs", fix)


def _better(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether `second` is right more often by two deviations of the images they disagree on."""
    gain, loss = int((second & ~first).sum()), int((first & ~second).sum())
    return gain - loss > 2 * sqrt(max(gain + loss, 1))


def _hits(findings: Findings) -> dict[str, np.ndarray] | None:
    if findings.images is None or findings.images.labels is None:
        return None
    if "reactions" not in findings.results:
        return None
    labels = findings.results["reactions"]["labels"]
    return {name: np.asarray(each) == findings.images.labels for name, each in labels.items()}


def _range(findings: Findings) -> Verdict:
    expected, hits = "images in 0 to 1", _hits(findings)
    if hits is None:
        return _not_judged("range", expected, "not judged", "give --images, a folder with labels")
    found = f"accuracy {hits['bgr'].mean():.1%} in 0 to 1, {hits['bgr255'].mean():.1%} in 0 to 255"
    good = not _better(hits["bgr"], hits["bgr255"])
    return decide("range", good, expected, found, "do not divide by 255 in the model")


def _channels(findings: Findings) -> Verdict:
    expected, hits = "channels in order BGR", _hits(findings)
    fix = "give --images, a folder with labels and colours"
    if hits is None:
        return _not_judged("channels", expected, "not judged", fix)
    if findings.results["reactions"]["grey"]:
        return _not_judged("channels", expected, "not judged: the images are grey", fix)
    found = f"accuracy {hits['bgr'].mean():.1%} as BGR, {hits['rgb'].mean():.1%} as RGB"
    if not _better(hits["bgr"], hits["rgb"]) and not _better(hits["rgb"], hits["bgr"]):
        return _not_judged("channels", expected, f"{found}: no clear difference", fix)
    good = _better(hits["rgb"], hits["bgr"])
    return decide("channels", good, expected, found, "flip them first: images = images.flip(1)")


def _not_judged(check: str, expected: str, found: str, fix: str) -> Verdict:
    return Verdict(check=check, status="note", expected=expected, found=found, fix=fix)
