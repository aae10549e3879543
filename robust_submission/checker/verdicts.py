"""Findings to verdicts: each check with what was expected, what was found, and how to fix it."""

from typing import Any

from robust_submission.checker.host import STAGES, Findings, Rules, needless
from robust_submission.checker.output_verdicts import judge_outputs
from robust_submission.checker.verdict import Verdict, decide, error_words, fail
from robust_submission.cli.errors import UserError


def judge(findings: Findings, rules: Rules) -> list[Verdict]:
    """Every verdict that the findings allow, in the order in which one would fix what they find."""
    if (refused := findings.refused) is not None:
        return [fail("archive", refused.expected, refused.found, refused.fix)]
    try:
        return [each for each in _judge_run(findings, rules) if each]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        found = f"a result that the trial does not write ({type(error).__name__}: {error})"
        return [fail("loading", "the trial's own result", found, "do not meddle with the trial")]


def _judge_run(findings: Findings, rules: Rules) -> list[Verdict | None]:
    verdicts: list[Verdict | None] = [_archive(findings), _ending(findings, rules)]
    results = findings.results
    if results.get("load") is not True:
        return verdicts
    verdicts += [_parameters(results, rules), _trainable(results), _operations(results, rules)]
    return verdicts + judge_outputs(findings, rules)


def _archive(findings: Findings) -> Verdict | None:
    if findings.kind != ".zip":
        return None
    if extra := needless(findings.files):
        fix = "leave out what the model does not read"
        found = f"{len(extra)} needless: {extra[0]}"
        return Verdict(check="archive", status="note", expected="no more", found=found, fix=fix)
    found = ", ".join(sorted(findings.files)[:4])
    return decide("archive", True, "model.py at the top level, safe paths", found, "")


def _ending(findings: Findings, rules: Rules) -> Verdict:
    """Whether the model loaded and the trial came to its end."""
    run, results = findings.run, findings.results
    assert run is not None
    stage = STAGES.get(run.stage, run.stage)
    if run.result is None and run.found.startswith("still running"):
        fix = "look for an endless loop or a model far too slow, or raise --timeout"
        expected = f"an end within {rules.limits.seconds:g} s"
        return fail("time", expected, f"{run.found}, while {stage}", fix)
    errors = [value["error"] for value in results.values() if error_words(value)]
    gone = run.result is None and run.found.startswith("killed")
    if gone or any(error["kind"] == "MemoryError" for error in errors):
        expected = f"at most {rules.limits.memory / 1e9:g} GB of memory"
        found = f"{run.found if gone else 'more asked for'}, while {stage}"
        return fail("memory", expected, found, "use less memory, or raise --memory")
    if results.get("contacts"):
        found = f"a call to {results['contacts'][0]}"
        return fail("network", "no network", found, "put all that the model reads in the zip")
    if run.result is None:
        last = (run.output.strip().splitlines() or [""])[-1]
        found = f"{run.found}, while {stage}: {last}"
        return fail("loading", "Model() to load and run", found, "do not end the process")
    return _loading(results, findings, rules)


def _loading(results: dict[str, Any], findings: Findings, rules: Rules) -> Verdict:
    expected = "a class Model that takes no arguments"
    if findings.kind == ".onnx":
        expected = "one file that onnx and onnxruntime accept"
    load = results["load"]
    if load is True:
        return decide("loading", True, expected, f"loaded; all in {findings.seconds:.0f} s", "")
    words = error_words(load)
    if words is None:
        raise UserError(f"load: {load}")
    error = load["error"]
    if error["kind"] == "ModuleNotFoundError":
        module = error["module"].split(".")[0]
        fix = f"write out in model.py what {module} does, or submit ONNX (package.py --out x.onnx)"
        found = f"needs {module} ({error['place']})"
        return fail("packages", f"{' and '.join(rules.packages)} alone", found, fix)
    if error["kind"] == "ContractError":
        fix = "define class Model(torch.nn.Module) in model.py"
        return fail("loading", expected, error["message"], fix)
    if error["kind"] == "FileNotFoundError":
        fix = "open files relative to os.path.dirname(__file__), and pack them"
        return fail("loading", expected, words, fix)
    return fail("loading", expected, words, "run `from model import Model; Model()` and fix it")


def _parameters(results: dict[str, Any], rules: Rules) -> Verdict:
    expected = f"fewer than {rules.max_parameters / 1e6:g} M"
    if words := error_words(results["parameters"]):
        return fail("parameters", expected, words, "see the error")
    total = results["parameters"]["total"]
    good = total < rules.max_parameters
    return decide("parameters", good, expected, _millions(total), "take a smaller network")


def _millions(number: float) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e4 else f"{number:g}"


def _trainable(results: dict[str, Any]) -> Verdict | None:
    if "trainable" not in results["parameters"]:
        return None
    trainable = results["parameters"]["trainable"]
    fix = "leave requires_grad on for one parameter: DistributedDataParallel needs it"
    found = f"{_millions(trainable)} of {_millions(results['parameters']['total'])}"
    return decide("trainable", trainable > 0, "at least one parameter", found, fix)


def _operations(results: dict[str, Any], rules: Rules) -> Verdict:
    """The larger of ptflops and of what torch really ran."""
    counts = dict[str, float]()
    if isinstance(results.get("operations"), dict):
        counts["graph"] = results["operations"].get("graph", 0)
    for name in ("ptflops", "dispatched"):
        if isinstance(results.get(name), float):
            counts[name] = results[name]
    expected = f"fewer than {rules.max_operations / 1e9:g} G multiply-adds"
    if not counts:
        names = ("dispatched", "ptflops", "operations", "outputs")
        errors = [words for name in names if (words := error_words(results.get(name)))]
        return fail("operations", expected, (errors or ["not counted"])[0], "see the error")
    labels = {"graph": "in the graph", "ptflops": "by ptflops", "dispatched": "run by torch"}
    found = ", ".join(f"{count / 1e9:.3g} G {labels[name]}" for name, count in counts.items())
    if left := results.get("operations", {}).get("uncounted"):
        found += f"; not counted: {', '.join(left)}"
    good = max(counts.values()) < rules.max_operations
    fix = "take a smaller network or input; a backward pass inside the model counts too"
    return decide("operations", good, expected, found, fix)
