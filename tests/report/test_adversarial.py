"""Adversarial images in 8 bits stay in their ball; files keep the images' names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_submission.evaluation.jobs import Attacker
from robust_submission.report.adversarial import AdversarialImages, claim_text, file_names


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.03), ("linf", 8 / 255), ("l2", 0.5)])
def test_rounded_images_stay_in_the_ball(norm: str, epsilon: float, tmp_path: Path):
    rng = np.random.default_rng(0)
    clean = (rng.integers(0, 256, (5, 3, 8, 8)) / 255).astype(np.float32)
    step = rng.standard_normal(clean.shape) if norm == "l2" else rng.choice([-1, 1], clean.shape)
    size = np.sqrt((step**2).sum(axis=(1, 2, 3), keepdims=True)) if norm == "l2" else 1
    attacked = (clean + epsilon * step / size).clip(0, 1).astype(np.float32)
    images = AdversarialImages(
        ids=[f"a/{n}.jpg" for n in range(5)], clean=clean, attacked=attacked, labels=np.arange(5)
    )
    pixels = images.in_eight_bits(norm, epsilon)
    moved = pixels.transpose(0, 3, 1, 2) / 255 - clean
    if norm == "l2":
        assert (np.sqrt((moved**2).sum(axis=(1, 2, 3))) <= epsilon + 1e-6).all()
    else:
        assert np.abs(moved).max() <= epsilon + 1e-6
        inside = (attacked > 0) & (attacked < 1)
        assert np.allclose(np.abs(moved)[inside], np.floor(255 * epsilon + 1e-6) / 255, atol=1e-6)
    assert np.abs(moved).max() > 0
    images.write_files(tmp_path / "out", pixels)
    for number in range(5):
        assert np.array_equal(
            np.array(Image.open(tmp_path / f"out/a/{number}.png")), pixels[number]
        )


def test_names_stay_apart():
    assert file_names(["a/1.jpg", "2.png", "b"]) == ["a/1.png", "2.png", "b.png"]
    assert file_names(["1.jpg", "1.png"]) == ["1.jpg.png", "1.png.png"]


def test_names_stay_in_the_folder():
    assert file_names(["/data/a.jpg", "../../b.png", "c/../d"]) == ["data/a.png", "b.png", "d.png"]
    assert file_names(["../a.png", "a.png"]) == ["00000.png", "00001.png"]


def test_the_claim_says_what_the_report_does(example, measured):
    masked = claim_text(example())
    assert "95.0" in masked and "at most 0.3" in masked and "masked; 94.0" in masked
    sound = example(
        verdict="no sign of masking", measurements=(measured(attacker=Attacker.ADAPTIVE),)
    )
    assert "masked" not in claim_text(sound) and "pgd (adaptive)" in claim_text(sound)
    with pytest.raises(ValueError, match="expected an attack"):
        claim_text(example(measurements=()))
