"""The card's numbers are the report's, the report is the model's, and one commit holds it all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from robust_submission.cli.command import parse
from robust_submission.cli.errors import UserError
from robust_submission.hub import model_card as hub_module
from robust_submission.hub.model_card import fill_folder, model_card, training, upload
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint, save_trn
from robust_submission.models.trn import TRN
from robust_submission.report import text as report_text
from robust_submission.report.schema import read_report
from submission.push_to_hub import Options
from tests.conftest import run_command

COPIED = ("config.json", "model.safetensors", "recipe.yaml", "provenance.json")


@pytest.fixture(scope="module")
def report(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of a small run behind GCM."""
    out = tmp_path_factory.mktemp("reports") / "report"
    few = ("--attacks", "fgsm,pgd", "--steps", 2, "--limit", 40, "--curves", "false")
    done = run_command("inference/evaluate.py", "--checkpoint", small_run, "--out", out, *few)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pushed(small_run: Path, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to upload, by the command."""
    out = tmp_path_factory.mktemp("pushed") / "digits"
    words = ("--checkpoint", small_run, "--report", report, "--out", out)
    done = run_command("submission/push_to_hub.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'README.md'}\n"
    return out


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    (tmp_path / "copy").mkdir()
    for name in COPIED:
        shutil.copyfile(small_run / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to fill."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def table(card: ModelCard) -> dict[str, dict[str, str]]:
    """The card's one table: for each attack, norm and epsilon its cells by column."""
    text = card.text.replace("\N{NO-BREAK SPACE}", " ")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines)
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    return {" ".join([row["attack"], row["norm"], row["epsilon"]]): row for row in cells}


def shown(share: dict[str, Any]) -> str:
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % [{low} to {high} %]"


def test_the_cards_table_holds_the_reports_numbers(pushed: Path, report: Path):
    found = json.loads((report / "report.json").read_text())
    rows = table(ModelCard.load(pushed / "README.md"))
    worst = rows["worst case per image over all attacks L∞ 8/255"]
    assert worst["oblivious"] == shown(found["oblivious"])
    assert worst["adaptive"] == f"at most {shown(found['adaptive'])}"
    for one in found["measurements"]:
        row = rows[f"{one['attack']} L∞ 8/255"]
        assert row[one["attacker"]] == shown(one["robust_accuracy"])
    assert {row["clean"] for row in rows.values()} == {shown(found["clean"])}
    assert {(row["images"], row["seed"]) for row in rows.values()} == {("40", "0")}
    assert found["oblivious"] != found["adaptive"] != found["clean"]


def test_the_metadata_holds_the_reports_numbers(pushed: Path, report: Path):
    found = json.loads((report / "report.json").read_text())
    card = ModelCard.load(pushed / "README.md")
    data: Any = card.data
    assert (data.library_name, data.pipeline_tag) == ("robust-submission", "image-classification")
    assert data.license is None and data.model_name == "digits"
    clean, oblivious, adaptive, *attacks = data.eval_results
    for result, name in ((clean, "clean"), (oblivious, "oblivious"), (adaptive, "adaptive")):
        assert result.metric_value == found[name]["value"]
        assert result.metric_args["interval_95"] == [found[name]["low"], found[name]["high"]]
    assert len(attacks) == len(found["measurements"]) == 6
    for result, one in zip(attacks, found["measurements"], strict=True):
        share = one["robust_accuracy"]
        assert result.metric_value == share["value"]
        assert one["name"] in result.metric_name and "40 images" in result.metric_name
        assert ("(masked)" in result.metric_name) == (one["attacker"] == "oblivious")
        assert result.metric_args == {
            **{key: one[key] for key in ("attack", "norm", "epsilon", "attacker")},
            "images": 40,
            "seed": 0,
            "interval_95": [share["low"], share["high"]],
        }
    assert len({result.metric_name for result in data.eval_results}) == 9
    assert {result.dataset_type for result in data.eval_results} == {"digits"}
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_a_masked_verdict_comes_first_with_its_evidence(pushed: Path, report: Path):
    found, text = read_report(report), ModelCard.load(pushed / "README.md").text
    assert found.verdict == "masked"
    first = f"> **{report_text.headline(found)}** {report_text.reason(found)}\n"
    assert text.lstrip().startswith(first)
    signs = found.checks_with("masking")
    assert signs and all(check.question in text and check.found in text for check in signs)
    assert found.threat_model in text
    honest = replace(found, verdict="no sign of masking")
    card = model_card(load_checkpoint(pushed), "digits", report=honest)
    assert card.text.lstrip().startswith("# digits") and report_text.reason(honest) in card.text
    assert "(masked)" not in str(card)


def test_the_folder_is_the_checkpoint_and_loads_as_the_card_says(
    pushed: Path, small_run: Path, report: Path
):
    assert {path.name for path in pushed.iterdir()} == {*COPIED, "report.json", "README.md"}
    for name in COPIED:
        assert (pushed / name).read_bytes() == (small_run / name).read_bytes()
    assert (pushed / "report.json").read_bytes() == (report / "report.json").read_bytes()
    assert [path.name for path in pushed.parent.iterdir()] == ["digits"]
    text = ModelCard.load(pushed / "README.md").text
    code = text.split("```python\n")[1].split("```")[0]
    images = torch.rand(3, 3, 32, 32)
    scope: dict[str, Any] = {"images": images}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.chdir(pushed.parent)
        exec(code, scope)
        assert torch.equal(scope["logits"], load_checkpoint(small_run)(images))
    assert len(scope["names"]) == 3 and set(scope["names"]) <= set(scope["model"].class_names)
    assert "- Backbone: test_convnext of timm" in text and "- GCM: hides gradients" in text


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"conceal": False},
        {"mean": [0.5, 0.5, 0.5]},
        {"image_size": 48},
        {"randomize": {"min_size": 20}},
    ],
)
def test_the_report_of_another_model_is_refused(
    change: dict[str, object], copy: Path, report: Path, folder: Path
):
    if change:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | change))
    else:
        tensors = load_file(copy / "model.safetensors")
        tensors[min(tensors)].flatten()[0] += 1e-3
        save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"report\.json: expected a report of the model in .*copy"):
        fill_folder(folder, "digits", checkpoint=copy, report=report)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "damaged", "expected a safetensors file, found other bytes"),
        ("recipe.yaml", "data: 5", "data: expected a valid dictionary, found 5"),
        ("recipe.yaml", "data: {name: x, root: null}\nseed: a", "seed: expected a valid integer"),
        ("recipe.yaml", "\xff", "expected a recipe in YAML"),
        ("provenance.json", "[]", r"expected a valid dictionary, found \[\]"),
        ("provenance.json", "{", "expected a run's provenance in JSON, found: EOF"),
        ("report.json", "{", "expected the report of a finished evaluation in JSON, found: "),
        ("report.json", '{"schema": "\x1b"}', "expected the report of .* in JSON, found: control"),
        ("report.json", '{"schema": 4}', "model: expected this key, found none"),
        ("report.json", None, "expected the report of a finished evaluation"),
    ],
)
def test_damaged_files_are_named(
    copy: Path, folder: Path, name: str, content: str | None, message: str
):
    if content is not None:
        (copy / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name}: {message}"):
        report = copy if name == "report.json" else None
        fill_folder(folder, "digits", checkpoint=copy, report=report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": {"value": 1.5}}, "clean.value: expected less than or equal to 1, found 1.5"),
        ({"clean": {"total": -1}}, "clean.total: expected greater than or equal to 0, found -1"),
        ({"adaptive": None}, "adaptive: expected a dictionary"),
        ({"measurements": []}, "measurements: expected tuple should have at least 1 item"),
        ({"verdict": "honest"}, "verdict: expected 'masked'"),
    ],
)
def test_a_report_of_other_values_is_refused(
    report: Path, folder: Path, change: dict[str, Any], message: str
):
    content = json.loads((report / "report.json").read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"report\.json: {message}"):
        read_report(folder)


def test_what_is_a_strangers_is_text_on_the_card(report: Path, copy: Path):
    """Names of classes and places, for which a browser or Markdown has another meaning."""
    evil = "<script>x</script> [a](javascript:b) \x1b[2J\n# A heading | cell `code`"
    found = read_report(report)
    found = replace(found, threat_model=evil, data=found.data | {"source": evil, evil: 1})
    model = load_checkpoint(copy)
    model.class_names[0] = evil
    card = model_card(model, evil, report=found, recipe={"seed": evil}, provenance={evil: evil})
    shown = r"\<script\>x\</script\> \[a\](javascript:b) \\x1b\[2J # A heading \| cell \`code\`"
    assert card.text.count(shown) == 8
    rest = card.text.replace(shown, "").replace(json.dumps(evil), "")
    assert "script" not in rest and "heading" not in rest


def test_a_report_without_a_digest_is_refused(report: Path, small_run: Path, folder: Path):
    content = json.loads((report / "report.json").read_text())
    del content["model"]["digest"]
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"report\.json: .*digest none"):
        fill_folder(folder, "digits", checkpoint=small_run, report=folder)


def test_an_existing_folder_is_refused_and_kept(small_run: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    words = ("--checkpoint", small_run, "--out", tmp_path)
    done = run_command("submission/push_to_hub.py", *words)
    assert done.returncode == 1 and "expected nothing there yet, found a folder" in done.stderr
    assert (tmp_path / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_without_a_report_the_card_claims_nothing(copy: Path, folder: Path):
    for name in ("recipe.yaml", "provenance.json"):
        (copy / name).unlink()
    fill_folder(folder, "digits", checkpoint=copy, license="mit")
    card = ModelCard.load(folder / "README.md")
    assert "Robustness has not been measured" in card.text
    assert "recipe is not known" in card.text
    assert "model-index" not in card.data.to_dict() and card.data.to_dict()["license"] == "mit"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    load_checkpoint(copy).save_pretrained(folder / "saved")
    card = ModelCard.load(folder / "saved" / "README.md")
    assert "Its robustness is not known from this page" in card.text
    assert "More Information Needed" not in card.text


def test_a_recipe_has_attack_settings_only_where_something_attacked():
    recipe = {"epochs": 3, "objective": {"name": "adversarial", "epsilon": 8 / 255, "steps": 10}}
    assert training(recipe) == {
        "epochs": "3",
        "objective.name": "adversarial",
        "objective.epsilon": "8/255",
        "objective.steps": "10",
    }
    for name in ("standard", "challenge"):  # the latter has attacks of its own
        recipe["objective"] = {"name": name, "epsilon": 8 / 255, "steps": 10}
        assert training(recipe) == {"epochs": "3", "objective.name": name}


def test_a_classifier_and_its_trn_are_one_model(small_run: Path, tmp_path: Path, folder: Path):
    torch.manual_seed(0)
    trn = TRN(channels=3, width=4, depth=1)
    torch.nn.init.normal_(trn.head.weight, std=0.1)
    save_trn(trn, tmp_path / "trn")
    fill_folder(folder, "digits", checkpoint=small_run, trn=tmp_path / "trn")
    images = torch.rand(2, 3, 32, 32)
    found = RobustClassifier.from_pretrained(folder)
    assert torch.equal(found(images), load_checkpoint(small_run, tmp_path / "trn")(images))
    assert not torch.equal(found(images), load_checkpoint(small_run)(images))
    assert "- TRN: TRN(streams" in (folder / "README.md").read_text()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands in for the hub's API."""
    api = Mock()
    api.upload_folder.return_value.commit_url = "https://hub/commit"
    monkeypatch.setattr(hub_module, "HfApi", lambda: api)
    return api


@pytest.mark.parametrize("private", [True, False])
def test_one_commit_holds_everything(private: bool, hub: Mock, pushed: Path):
    hub.model_info.return_value.private = private
    assert upload(pushed, "ada/digits", private=private) == "https://hub/commit"
    hub.create_repo.assert_called_once_with("ada/digits", private=private or None, exist_ok=True)
    hub.upload_folder.assert_called_once()
    uploaded = hub.upload_folder.call_args.kwargs
    assert uploaded["repo_id"] == "ada/digits" and uploaded["folder_path"] == pushed
    assert set(uploaded["delete_patterns"]) == {"recipe.yaml", "provenance.json", "report.json"}


REFUSED = httpx2.Response(401, request=httpx2.Request("POST", "https://hub"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "expected a private repository, found a public one"),
        (OfflineModeIsEnabled("Cannot reach the hub:\n\noffline"), "the hub: offline"),
        (RepositoryNotFoundError("401 Error.\n\nLog in.\n", response=REFUSED), "Error. Log in."),
        (httpx2.ConnectError("[Errno -2] Name unknown"), "Name unknown"),
    ],
)
def test_a_failed_upload_is_one_line(
    error: Exception | None, message: str, hub: Mock, tmp_path: Path
):
    hub.create_repo.side_effect, hub.model_info.return_value.private = error, False
    with pytest.raises(UserError) as raised:
        upload(tmp_path, "ada/digits", private=True)
    (line,) = str(raised.value).splitlines()
    assert line.startswith("ada/digits: not uploaded: ") and message in line
    hub.create_repo.assert_called_once()
    hub.upload_folder.assert_not_called()


def test_without_a_network_the_command_says_so_in_a_line(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    script = "submission/push_to_hub.py"
    done = run_command(script, "--checkpoint", small_run, "--repo_id", "ada/digits")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ada/digits: not uploaded: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "expected either --repo_id or --out, found both or neither"),
        ("--repo_id=a/b --out=c", "expected either --repo_id or --out, found both"),
        ("--out=c --private", "--private: expected a --repo_id"),
        ("--repo_id=digits", "--repo_id: expected user/name, found 'digits'"),
        ("--repo_id=a/b$c", "--repo_id: expected user/name, found: .*'a/b\\$c'"),
        ("--repo_id=/b", "--repo_id: expected user/name, found: .*'/b'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: str, message: str):
    with pytest.raises(UserError, match=message) as raised:
        parse(Options, options.split())
    assert len(str(raised.value).splitlines()) == 1
