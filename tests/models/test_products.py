"""Which library multiplies."""

from pathlib import Path

import pytest

from robust_submission.models.cpu import products
from robust_submission.models.cpu.products import fewest_rows, read_processor

PROCESSORS = {
    "zen3": ("AuthenticAMD", 25, True, 3072),
    "zen4": ("AuthenticAMD", 25, False, 512),
    "zen5": ("AuthenticAMD", 26, False, 64),
    "zen5 without avx512": ("AuthenticAMD", 26, True, 3072),
    "intel": ("GenuineIntel", 6, False, 8192),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_says_when_onednn_is_faster(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vendor, family, avx2_alone, expected = PROCESSORS[name]
    monkeypatch.setattr(products, "_AVX2_ALONE", avx2_alone)
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n"
    path = tmp_path / "cpuinfo"
    path.write_text(f"{core}power management:\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n")
    assert fewest_rows(*read_processor(path)) == expected


def test_an_unknown_processor_is_taken_for_an_ordinary_one(tmp_path: Path):
    path = tmp_path / "cpuinfo"
    assert fewest_rows(*read_processor(path)) == 512
    path.write_text("processor\t: 0\nCPU implementer\t: 0x41\nFeatures\t: fp asimd\n")
    assert fewest_rows(*read_processor(path)) == 512
