"""The container's check: skipped in words where there is no engine, strict where two differ."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from inference import predict
from robust_submission.cli.command import parse
from tests.conftest import ROOT
from tests.container_check import Options, compare, container_check, contents


def export(**files: bytes) -> dict[str, tuple[int, int, int, str]]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, (name, content) in enumerate(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), number
            archive.addfile(entry, io.BytesIO(content))
    return contents(io.BytesIO(stream.getvalue()))


def test_two_builds_differ_by_content_not_by_time():
    compare(export(a=b"1", b=b"2"), export(b=b"2", a=b"1"))
    for other in (export(a=b"1", b=b"3"), export(a=b"1"), export(a=b"1", b=b"2", c=b"")):
        with pytest.raises(ValueError, match=r"found 1 others:\n[bc]"):
            compare(export(a=b"1", b=b"2"), other)


def test_without_an_engine_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CONTAINER_ENGINE", "no-such-engine")
    container_check(Options())
    assert "skipped, as neither docker nor podman" in capsys.readouterr().out


def test_the_lock_holds_every_runtime_requirement_with_hashes():
    """What requirements.txt pins and the lock, which pip reads alone, may not drift apart."""
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(
        re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.M)
    )
    assert len(locked) == len(re.findall(r"^\S+==", lock, re.MULTILINE))
    tools = {"ruff", "basedpyright", "pytest", "pytest-xdist", "hypothesis"}
    wanted = re.findall(
        r"^([\w-]+)(?:\[\w+\])?==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M
    )
    assert len(wanted) > 20
    for name, version in wanted:
        key = name.replace("_", "-")
        assert key in tools or locked[key] == version, name
    assert not tools & locked.keys()


def test_options_after_the_images_name_are_added_to_its_own():
    words = (ROOT / "Dockerfile").read_text().replace("\\\n", "").partition("\nENTRYPOINT ")[2]
    own = json.loads(words)[2:]
    plain = parse(predict.Options, own)
    named = (plain.checkpoint, plain.images, plain.out)
    assert named == (Path("/checkpoint"), Path("/in"), Path("/out/sub.csv"))
    added = parse(predict.Options, [*own, "--probabilities", "--out", "/out/sub.json"])
    assert added == parse(
        predict.Options,
        ["--checkpoint=/checkpoint", "--images=/in", "--out=/out/sub.json", "--probabilities"],
    )
