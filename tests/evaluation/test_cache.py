"""What the journal returns, and what it refuses; how models and code are named."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_submission.cli.errors import UserError, log
from robust_submission.evaluation.cache import Journal, code_digest, model_digest

SETTINGS = {"seed": 0, "model": "abc"}
IMAGES = torch.zeros(2, 3, 4, 4)


def written(folder: Path) -> Journal:
    journal = Journal(folder, SETTINGS)
    journal.prepare()
    journal.save("pgd", 3, "pixels", {"found": np.arange(4)})
    return journal


def test_returns_what_was_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    written(tmp_path / "j")
    again = Journal(tmp_path / "j", SETTINGS)
    with logged(caplog, "continuing with the 1 parts"):
        again.prepare()
    found = again.load("pgd", 3, "pixels")
    assert found is not None and list(found) == ["found"]
    assert np.array_equal(found["found"], np.arange(4))


@contextmanager
def logged(caplog: pytest.LogCaptureFixture, message: str) -> Iterator[None]:
    """Expect a message of the project's logger."""
    caplog.clear()
    with caplog.at_level(logging.INFO, log.name):
        log.addHandler(caplog.handler)
        yield
        log.removeHandler(caplog.handler)
    assert message in caplog.text


def test_two_evaluations_in_one_folder(tmp_path: Path):
    journal, pid = written(tmp_path / "j"), os.fork()
    if pid == 0:
        try:
            Journal(tmp_path / "j", SETTINGS | {"seed": 1}).prepare()
        except ValueError as error:
            os._exit(3 if "expected no other process at work there" in str(error) else 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert journal.load("pgd", 3, "pixels") is not None


def test_links_are_not_followed(tmp_path: Path):
    """Neither in place of the journal, whose files would be deleted, nor of what is in it."""
    users, before = tmp_path / "users", {"file": "mine", "settings.json": "{}"}
    users.mkdir()
    for name, content in before.items():
        (users / name).write_text(content)
    (tmp_path / "j").symlink_to(users)
    with pytest.raises(UserError, match=f"^{tmp_path}/j: expected a folder of its own, found a sy"):
        Journal(tmp_path / "j", SETTINGS).prepare()
    (tmp_path / "j").unlink()
    journal = written(tmp_path / "j")
    (tmp_path / "j" / "fgsm").symlink_to(users)
    with pytest.raises(
        UserError, match="fgsm: expected a folder of its own, found a symbolic link"
    ):
        journal.save("fgsm", 0, "pixels", {})
    journal.remove()
    assert {path.name: path.read_text() for path in users.iterdir()} == before


def test_refuses_other_pixels_and_what_is_missing(tmp_path: Path):
    journal = written(tmp_path / "j")
    assert journal.load("pgd", 3, "other pixels") is None
    assert journal.load("pgd", 4, "pixels") is None
    assert journal.load("fgsm", 3, "pixels") is None


def test_other_settings_start_over_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    written(tmp_path / "j")
    other = Journal(tmp_path / "j", SETTINGS | {"seed": 1})
    with logged(caplog, f"starting over: {tmp_path / 'j'} is of another seed"):
        other.prepare()
    assert other.load("pgd", 3, "pixels") is None


@pytest.mark.parametrize("settings", ["{", "[3]"])
def test_a_journal_without_its_settings_starts_over(settings: str, tmp_path: Path):
    journal = written(tmp_path / "j")
    (tmp_path / "j" / "settings.json").write_text(settings)
    Journal(tmp_path / "j", SETTINGS).prepare()
    assert journal.load("pgd", 3, "pixels") is None


def test_a_damaged_part_is_not_returned_and_all_can_be_removed(tmp_path: Path):
    journal = written(tmp_path / "j")
    (part,) = (tmp_path / "j").glob("*/*.npz")
    part.write_bytes(part.read_bytes()[:20])
    assert journal.load("pgd", 3, "pixels") is None
    journal.remove()
    assert not (tmp_path / "j").exists()


def test_a_plain_function_is_known_by_its_outputs_and_its_code():
    def digest_with(scale: float) -> str:
        return model_digest(lambda images: images.flatten(1)[:, :3] * scale, IMAGES)

    assert digest_with(2) == digest_with(2) != digest_with(3)  # the outputs are zero
    # Python cannot look into a compiled function: two with other outputs on these images.
    assert model_digest(torch.sin, IMAGES[0]) != model_digest(torch.cos, IMAGES[0])


def test_a_function_with_unseeded_generators_is_known_by_its_code():
    def digest_with(scale: float) -> str:
        own, other = np.random.default_rng(), torch.Generator()
        other.seed()
        return model_digest(
            lambda _: scale * (torch.rand(3, generator=other) + own.random()), IMAGES
        )

    assert digest_with(2) == digest_with(2) != digest_with(3)


def test_code_is_known_by_its_bytes_at_any_depth(tmp_path: Path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "room" / "a.py").write_text("2")
    assert code_digest(tmp_path) != before
