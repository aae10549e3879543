"""The card's numbers are the report's, the report is the model's, and one commit holds it all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import submission.push_to_hub
from inference.evaluate import Options as EvaluateOptions
from inference.evaluate import evaluate
from robust_submission.cli.command import Names, run
from robust_submission.evaluation import wording
from robust_submission.hub.model_card import model_card, training
from robust_submission.models.checkpoint import save_trn
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.models.trn import TRN
from robust_submission.report.write import json_text, read_report
from submission.push_to_hub import Options, push_to_hub
from tests.conftest import run_command

COPIED = ("config.json", "model.safetensors", "recipe.yaml", "provenance.json")


@pytest.fixture(scope="module")
def report(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of a small run behind GCM."""
    out = tmp_path_factory.mktemp("reports") / "report"
    few = EvaluateOptions(checkpoint=small_run, out=out, attacks=Names("fgsm,pgd"), steps=2)
    evaluate(replace(few, limit=40, curves=False))
    return out


@pytest.fixture(scope="module")
def pushed(small_run: Path, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would go up."""
    out = tmp_path_factory.mktemp("pushed") / "digits"
    push_to_hub(Options(checkpoint=small_run, report=report, out=out))
    return out


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    (tmp_path / "copy").mkdir()
    for name in COPIED:
        shutil.copyfile(small_run / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def table(card: ModelCard) -> dict[str, dict[str, str]]:
    """The card's one table: for each attack, norm and epsilon its cells by column."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines)
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    return {" ".join([row["attack"], row["norm"], row["epsilon"]]): row for row in cells}


def shown(share: dict[str, Any]) -> str:
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % [{low} to {high} %]"


def test_the_cards_table_holds_the_reports_numbers(pushed: Path, report: Path):
    found = json.loads((report / "report.json").read_text())
    rows = table(ModelCard.load(pushed / "README.md"))
    plain = {
        key: {name: cell.replace("\N{NO-BREAK SPACE}", " ") for name, cell in row.items()}
        for key, row in rows.items()
    }
    worst = plain["worst case of all, image by image L∞ 8/255"]
    assert worst["oblivious"] == shown(found["oblivious"])
    assert worst["adaptive"] == shown(found["adaptive"])
    for one in found["measurements"]:
        row = plain[f"{one['attack']} L∞ 8/255"]
        assert row[one["attacker"]] == shown(one["robust_accuracy"])
    assert {row["clean"] for row in plain.values()} == {shown(found["clean"])}
    assert {(row["images"], row["seed"]) for row in plain.values()} == {("40", "0")}
    assert found["oblivious"] != found["adaptive"] != found["clean"]


def test_the_metadata_holds_the_reports_numbers_and_survives_a_round_trip(
    pushed: Path, report: Path
):
    found = json.loads((report / "report.json").read_text())
    card = ModelCard.load(pushed / "README.md")
    data: Any = card.data
    assert (data.library_name, data.pipeline_tag) == ("robust-submission", "image-classification")
    assert data.license is None and data.model_name == "digits"
    clean, oblivious, adaptive, *attacks = data.eval_results
    assert clean.metric_value == found["clean"]["value"]
    assert clean.metric_args["interval_95"] == [found["clean"]["low"], found["clean"]["high"]]
    assert oblivious.metric_value == found["oblivious"]["value"]
    assert adaptive.metric_value == found["adaptive"]["value"]
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
    first = f"> **{wording.headline(found)}** {wording.reason(found)}\n"
    assert text.lstrip().startswith(first)
    signs = wording.checks_with(found, "masking")
    assert signs and all(check.question in text and check.found in text for check in signs)
    assert found.threat_model in text
    honest = replace(found, verdict="no sign of masking")
    text = model_card(load_checkpoint(pushed), "digits", report=honest).text
    assert text.lstrip().startswith("# digits") and wording.reason(honest) in text
    assert "(masked)" not in str(model_card(load_checkpoint(pushed), "digits", report=honest))


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
    assert "- Backbone: test_convnext of timm" in text and "- GCM: in front" in text


def spoil_weights(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[min(tensors)].flatten()[0] += 1e-3
    save_file(tensors, checkpoint / "model.safetensors")


def spoil_config(**changes: object) -> Callable[[Path], None]:
    def spoil(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | changes))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_weights,
        spoil_config(conceal=False),
        spoil_config(mean=[0.5, 0.5, 0.5]),
        spoil_config(image_size=48),
        spoil_config(randomize={"min_size": 20}),
    ],
)
def test_the_report_of_another_model_is_refused(
    spoil: Callable[[Path], None], copy: Path, report: Path, tmp_path: Path
):
    spoil(copy)
    with pytest.raises(ValueError, match=r"report\.json: expected a report of the model in .*copy"):
        push_to_hub(Options(checkpoint=copy, report=report, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def without_digest(report: dict[str, Any]) -> None:
    del report["model"]["digest"]


def with_schema_2(report: dict[str, Any]) -> None:
    report["schema"] = 2


def with_no_number(report: dict[str, Any]) -> None:
    report["measurements"][1]["robust_accuracy"]["value"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_digest, "digest none"),
        (with_schema_2, "expected schema 1, found 2"),
        (with_no_number, r"found: measurements\.1\.robust_accuracy\.value: "),
        (None, "expected a whole report, found: Invalid JSON"),
    ],
)
def test_a_damaged_report_is_refused(
    change: Callable[[dict[str, Any]], None] | None,
    message: str,
    small_run: Path,
    report: Path,
    tmp_path: Path,
):
    text = (report / "report.json").read_text()
    if change is None:
        text = text[: len(text) // 2]
    else:
        content = json.loads(text)
        change(content)
        text = json.dumps(content)
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=rf"report\.json: .*{message}"):
        push_to_hub(Options(checkpoint=small_run, report=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_report_and_a_damaged_checkpoint_are_refused(copy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected the report of a finished evaluation"):
        push_to_hub(Options(checkpoint=copy, report=tmp_path, out=tmp_path / "out"))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(ValueError, match="expected a safetensors file, found other bytes"):
        push_to_hub(Options(checkpoint=copy, out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "data: 5", "expected a recipe with data.name and data.root"),
        ("recipe.yaml", "data: [name, root]", "expected a recipe with data.name and data.root"),
        ("recipe.yaml", "\xff", "expected a recipe in YAML"),
        (
            "recipe.yaml",
            "{data: {name: digits, root: null}, objective: standard}",
            "expected keys in objective, found 'standard'",
        ),
        ("provenance.json", "[]", "expected a JSON object, found a list"),
        ("provenance.json", '[["a", 1]]', "expected a JSON object, found a list"),
    ],
)
def test_damaged_notes_of_a_run_are_named(
    copy: Path, tmp_path: Path, name: str, content: str, message: str
):
    (copy / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        push_to_hub(Options(checkpoint=copy, out=tmp_path / "out"))


def test_an_existing_folder_is_refused_and_kept(small_run: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="expected nothing there yet, found a folder"):
        push_to_hub(Options(checkpoint=small_run, out=tmp_path))
    with pytest.raises(ValueError, match="expected nothing there yet, found a file"):
        push_to_hub(Options(checkpoint=small_run, out=tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_without_a_report_the_card_says_so_and_claims_nothing(copy: Path, tmp_path: Path):
    for name in ("recipe.yaml", "provenance.json"):
        (copy / name).unlink()
    push_to_hub(Options(checkpoint=copy, out=tmp_path / "out", license="mit"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "It has not been measured." in card.text and "recipe is not known" in card.text
    assert "model-index" not in card.data.to_dict() and card.data.to_dict()["license"] == "mit"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_what_trained_it_names_a_radius_only_where_something_attacked():
    recipe = {"epochs": 3, "objective": {"name": "adversarial", "epsilon": 8 / 255, "steps": 10}}
    assert training(recipe) == {
        "epochs": "3",
        "objective.name": "adversarial",
        "objective.epsilon": "8/255",
        "objective.steps": "10",
    }
    recipe["objective"]["name"] = "standard"  # pyright: ignore[reportIndexIssue]
    assert training(recipe) == {"epochs": "3", "objective.name": "standard"}


def test_the_card_that_save_pretrained_writes_claims_no_robustness(pushed: Path, tmp_path: Path):
    load_checkpoint(pushed).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "Its robustness is not known from this page" in card.text
    assert "More Information Needed" not in card.text
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"


class FakeApi:
    """Notes what is asked of the hub; its repositories are private or not."""

    calls: list[tuple[str, dict[str, Any]]]
    is_private: bool
    error: Exception | None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.error is not None:
            raise self.error

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(id=repo_id, private=self.is_private)

    def upload_folder(self, *, folder_path: Path, **options: Any) -> SimpleNamespace:
        options["files"] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://hub/commit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.calls, FakeApi.is_private, FakeApi.error = [], True, None
    monkeypatch.setattr(submission.push_to_hub, "HfApi", FakeApi)
    return FakeApi


@pytest.mark.parametrize("private", [True, False])
def test_one_commit_holds_everything(
    private: bool,
    hub: type[FakeApi],
    small_run: Path,
    report: Path,
    pushed: Path,
    capsys: pytest.CaptureFixture[str],
):
    hub.is_private = private
    push_to_hub(Options(checkpoint=small_run, report=report, repo_id="ada/digits", private=private))
    (_, created), (name, uploaded) = hub.calls
    assert created == {"repo_id": "ada/digits", "private": private or None, "exist_ok": True}
    assert name == "upload_folder" and uploaded["repo_id"] == "ada/digits"
    assert set(uploaded["delete_patterns"]) == {"recipe.yaml", "provenance.json", "report.json"}
    files = uploaded["files"]
    card = files.pop("README.md").decode()
    assert 'RobustClassifier.from_pretrained("ada/digits")' in card
    assert files == {name: (pushed / name).read_bytes() for name in (*COPIED, "report.json")}
    assert capsys.readouterr().out == "https://hub/commit\n"


def test_nothing_private_goes_to_a_public_repository(hub: type[FakeApi], small_run: Path):
    hub.is_private = False
    with pytest.raises(ValueError, match="expected a private repository, found a public one"):
        push_to_hub(Options(checkpoint=small_run, repo_id="ada/digits", private=True))
    assert [name for name, _ in hub.calls] == ["create_repo"]


REQUEST = httpx2.Request("POST", "https://hub")
REFUSED = httpx2.Response(401, request=REQUEST)


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("Cannot reach the hub:\n\noffline mode is enabled"),
        RepositoryNotFoundError("401 Client Error.\n\nLog in.\n", response=REFUSED),
        httpx2.ConnectError("[Errno -2] Name or service not known"),
    ],
)
def test_a_failed_upload_is_one_line(
    error: Exception,
    hub: type[FakeApi],
    small_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    hub.error = error
    command = ["push_to_hub.py", "--checkpoint", str(small_run), "--repo_id", "ada/digits"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        run(push_to_hub, Options)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line == f"error: ada/digits: not uploaded: {' '.join(str(error).split())}"
    assert [name for name, _ in hub.calls] == ["create_repo"]


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
        ({}, "expected either --repo_id or --out, found both or neither"),
        ({"repo_id": "a/b", "out": Path("c")}, "expected either --repo_id or --out, found both"),
        ({"out": Path("c"), "private": True}, "--private: expected a --repo_id"),
        ({"repo_id": "digits"}, "--repo_id: expected user/name, found 'digits'"),
        ({"repo_id": "a/b c"}, "'b c'|'a/b c'"),
        ({"repo_id": "/b"}, "'/b'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as raised:
        Options(**options)
    assert len(str(raised.value).splitlines()) == 1


def test_with_a_trn_both_go_up_as_one_model(small_run: Path, tmp_path: Path):
    torch.manual_seed(0)
    trn = TRN(channels=3, width=4, depth=1)
    torch.nn.init.normal_(trn.head.weight, std=0.1)
    save_trn(trn, tmp_path / "trn")
    push_to_hub(Options(checkpoint=small_run, trn=tmp_path / "trn", out=tmp_path / "out"))
    images = torch.rand(2, 3, 32, 32)
    found = RobustClassifier.from_pretrained(tmp_path / "out")
    assert torch.equal(found(images), load_checkpoint(small_run, tmp_path / "trn")(images))
    assert not torch.equal(found(images), load_checkpoint(small_run)(images))
    assert "- TRN: TRN(streams" in (tmp_path / "out" / "README.md").read_text()


def test_a_report_that_was_read_is_the_one_that_was_written(report: Path):
    written = (report / "report.json").read_text(encoding="utf-8")
    assert json_text(read_report(report)) == written
