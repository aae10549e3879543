"""The page: the numbers, accessible, self-contained, with any name and any part missing."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from rich.console import Console

from robust_submission.cli.numbers import SPACE
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import CorruptedAccuracy, KindAccuracy, share_of
from robust_submission.report.curves import curve_svgs
from robust_submission.report.text import print_table

NASTY = "<script>alert('1')</script> & \"corgi\" [bold]$x_1$" + "long" * 30


class Page(HTMLParser):
    """A page's elements, text and unclosed tags."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def by_id(self, name):
        (found,) = [each for _, each in self.elements if each.get("id") == name]
        return found


def test_the_two_numbers_and_the_verdict_are_on_the_page(example, rendered):
    page = Page(rendered(example()))
    assert page.by_id("oblivious")["data-value"] == "0.94"
    assert page.by_id("adaptive")["data-value"] == "0.003"
    assert page.by_id("clean")["data-value"] == "0.95"
    assert page.by_id("median")["data-value"] == str(3.4 / 255)
    assert page.by_id("verdict")["data-value"] == "masked"
    text = page.text.replace(SPACE, " ")
    for words in (
        "Robust accuracy (oblivious)",
        "94.0 %",
        "940 of 1,000 images",
        "Robust accuracy (adaptive)",
        "0.3 %",
        "0.1 to 0.9 %",
        "1 of 2 checks shows it.",
        "93.7 points",
        "Half of 1,000 images fall within 3.4/255, those included that are wrong when clean.",
        "fmn-50 and pgd-20 (adaptive)",
        "He may change every pixel.",
        "8/255",
        "steps 20, step size 2/255",
        "torch 2.15.0",
        "Undefended twin 95.4 %",
    ):
        assert words in text, words


def test_corruptions_are_beside_the_headline_numbers(tmp_path, example, rendered):
    shares = tuple(share_of(count, 1000) for count in (900, 850, 800, 700, 550))
    kinds = tuple(
        KindAccuracy(kind=kind, mean=share_of(760, 1000), by_severity=shares)
        for kind in ("shot_noise", "speckle_noise", "fog")
    )
    report = example(corruptions=CorruptedAccuracy(mean=share_of(755, 1000), kinds=kinds))
    page = Page(rendered(report))
    text = page.text.replace(SPACE, " ")
    assert page.open == [] and page.by_id("corrupted")["data-value"] == "0.755"
    assert all(header.get("scope") for header in page.all("th"))
    for words in ("shot noise", "weather", "55.0 %", "beside 95.0 % clean and 0.3 % robust"):
        assert words in text, words
    console = Console(record=True, width=100, file=(tmp_path / "terminal").open("w"))
    print_table(report, console)
    (line,) = [each for each in console.export_text().splitlines() if "Corrupted" in each]
    assert "75.5" in line and "75.5" in repr(report).splitlines()[2]
    assert "corrupted" not in rendered(example()).partition("</style>")[2]


def test_the_page_is_self_contained_and_accessible(example, rendered):
    page = Page(rendered(example()))
    assert page.open == []
    assert not page.all("script")
    links = [each[key] for _, each in page.elements for key in ("src", "href") if key in each]
    assert all((link or "").startswith(("data:", "#")) for link in links), links
    assert "url(http" not in page.text
    assert all(image.get("alt") for image in page.all("img"))
    assert all(header.get("scope") for header in page.all("th"))
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(ids) == len(set(ids))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_curves_take_colours_and_font_from_the_page(example):
    (epsilon, l2), (steps,) = (
        curve_svgs(example(), name).values() for name in ("epsilon", "steps")
    )
    for drawing in (epsilon, l2, steps):
        assert "var(--adaptive)" in drawing
        assert "font-family: var(--sans)" in drawing
        assert not re.search(r"#[0-9a-f]{6}|DejaVu", drawing)
    assert "var(--oblivious)" in epsilon
    assert "var(--oblivious)" not in l2
    assert "L∞ epsilon, in 1/255" in epsilon
    assert "steps of the attack (L∞)" in steps


def test_names_are_text_never_markup(tmp_path, example, measured, rendered):
    picture = replace(example().gallery[0], label=NASTY, id=NASTY, adaptive_prediction=NASTY)
    check = replace(example().checks[0], question=NASTY, found=NASTY)
    nasty = example(
        model={"name": NASTY, "num_classes": 1000, NASTY: [NASTY]},
        threat_model=NASTY,
        measurements=(measured(NASTY, settings={NASTY: NASTY}),),
        checks=(check,),
        gallery=(picture,),
        provenance={NASTY: {NASTY: NASTY}},
    )
    text = rendered(nasty)
    assert "<script" not in text
    assert "[bold]$x_1$" in Page(text).text
    console = Console(record=True, width=400, file=(tmp_path / "terminal").open("w"))
    print_table(nasty, console)
    assert NASTY in console.export_text()


def test_absent_parts_leave_no_trace(tmp_path, example, rendered):
    bare = example(
        measurements=(), curves=(), checks=(), gallery=(), twin_clean=None, model={}, data={},
        provenance={}, verdict="no sign of masking", adaptive=share_of(931, 1000),
    )  # fmt: skip
    text = rendered(bare)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Threat model", "How to reproduce it"]
    page = Page(text)
    assert "No sign of masking." in page.text
    assert "They lie 0.9 points apart, within their intervals." in page.text
    assert "twin" not in page.text
    assert "chance" not in page.text
    print_table(bare, Console(file=(tmp_path / "terminal").open("w")))


def test_no_images_and_unknown_values_are_said_not_shown_as_zero(example, measured, rendered):
    unknown = replace(share_of(1, 2), value=math.nan, low=math.nan, high=math.nan)
    broken = example().curves[0]
    nothing = example(
        adaptive_robustness=share_of(0, 0),
        clean=unknown,
        curves=(replace(broken, accuracy=(unknown, *broken.accuracy[1:])),),
        measurements=(measured(robust_accuracy=unknown, largest_perturbation=math.nan),),
    )
    page = Page(rendered(nothing))
    assert page.by_id("clean")["data-value"] == ""
    assert "AR not known: no image was correct when clean" in page.text
    assert "not known" in page.text
    assert "nan" not in page.text.lower()


def test_a_random_model_shows_its_draws(example, rendered):
    by_draw = (0.52, 0.54, 0.5)
    report = example(
        oblivious=share_of(520, 1000, by_draw), adaptive=share_of(500.5, 1000, (0.5, 0.501))
    )
    text = Page(rendered(report)).text.replace(SPACE, " ")
    assert "3 draws: 52.0, 54.0, 50.0 %" in text
    assert "500.5 of 1,000 images" in text


def test_a_random_model_shows_what_a_retry_and_fixed_randomness_leave(tmp_path, example, rendered):
    changes = {"adaptive_worst_draw": share_of(2, 1000), "adaptive_fixed": share_of(1, 1000)}
    report = example(model={"name": "it", "random": True}, **changes)
    print_table(report, Console(file=(tmp_path / "terminal").open("w"), width=120))
    for shown in (rendered(report), (tmp_path / "terminal").read_text()):
        plain = " ".join(shown.replace('<span class="whole">', "").split())
        assert re.search(r"[Rr]ight in every draw 0\.2", plain)
        assert re.search(r"[Rr]andomness fixed, PGD 0\.1", plain)
    assert "every draw" not in rendered(example(**changes))


def test_oblivious_and_adaptive_of_one_attack_stand_together(example, measured):
    stronger = measured("pgd", Attacker.OBLIVIOUS, 900, epsilon=16 / 255)
    groups = example(measurements=(*example().measurements, stronger)).groups
    assert [[one.name for one in group] for group in groups] == [
        ["fgsm oblivious", "fgsm adaptive"],
        ["pgd oblivious", "pgd adaptive", "pgd transfer"],
        ["pgd oblivious"],
    ]


def test_a_perturbation_above_epsilon_is_marked(example, measured, rendered):
    assert "above epsilon" not in Page(rendered(example(curves=()))).text
    beyond = measured(largest_perturbation=8.1 / 255)
    assert "above epsilon" in Page(rendered(example(measurements=(beyond,), curves=()))).text


def _luminance(color: str) -> float:
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_every_text_colour_has_enough_contrast(example, rendered):
    style = rendered(example(curves=())).split("</style>")[0]
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2]]
    assert [scheme["paper"] for scheme in schemes] == ["#fdfdfc", "#12151a"]
    for scheme in schemes:
        for name in ("ink", "muted", "oblivious", "adaptive", "transfer", "alarm"):
            dark, light = sorted((_luminance(scheme[name]), _luminance(scheme["paper"])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_a_seed_is_no_quantity_and_what_is_not_there_is_said_in_words(example, rendered):
    odd = example(
        seed=12345,
        model={"name": "it", "num_classes": 21841, "parameters": None},
        data={"images": 1},
    )
    text = Page(rendered(odd)).text.replace(SPACE, " ")
    assert "seed12345" in text and "parametersnot known" in text
    assert "the images, 1 image\n" in text and "chance 0.00458 %" in text
    assert "AR 98.9 % of the images correct when clean" in text
