"""The page as a person meets it: in headless Chromium, where there is one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robust_submission.evaluation.schema import Attacker, Curve, Measurement, Picture, Report, share
from robust_submission.report.write import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
LONG = "honestly_without_a_single_space_" * 6


def small_report() -> Report:
    attacked = Measurement(
        name="pgd", attack=LONG, attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=8 / 255,
        settings={},
        robust_accuracy=share(940, 1000), attack_robustness=share(940, 950),
        largest_perturbation=8 / 255,
    )  # fmt: skip
    points = (share(950, 1000), share(3, 1000))
    picture = Picture(
        id=LONG, label="cat", clean_prediction="cat", oblivious_prediction="cat",
        adaptive_prediction=LONG,
    )  # fmt: skip
    return Report(
        model={"name": LONG, "num_classes": 10},
        data={"source": "cifar10", "images": 1000},
        threat_model="The attacker knows everything.",
        seed=0,
        clean=share(950, 1000),
        twin_clean=None,
        oblivious=share(940, 1000),
        adaptive=share(3, 1000),
        oblivious_robustness=share(940, 950),
        adaptive_robustness=share(3, 950),
        measurements=(attacked, replace(attacked, attacker=Attacker.ADAPTIVE)),
        curves=(
            Curve(
                name="epsilon",
                attacker=Attacker.ADAPTIVE,
                norm="linf",
                x=(0, 8 / 255),
                accuracy=points,
            ),
        ),
        checks=(),
        verdict="masked",
        gallery=(picture,),
        provenance={"git": LONG},
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # with the path given, selenium looks for no driver over the network
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def write_page(folder: Path, report: Report) -> str:
    images = [np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)]
    pictures = {"clean": images, "oblivious": images, "adaptive": images}
    write_report(report, pictures, pd.DataFrame({"id": [LONG]}), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("report"), small_report())


@pytest.fixture(scope="module")
def address_of_all(tmp_path_factory):
    """Of a report in which every image withstands everything."""
    every = dict.fromkeys(("clean", "oblivious", "adaptive"), share(1000, 1000))
    return write_page(tmp_path_factory.mktemp("all"), replace(small_report(), **every))


def show(browser, address, width=1280, scheme="light"):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)


def visible(browser, name):
    return browser.find_element("id", name).text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_numbers_can_be_read_off_the_page(browser, address):
    show(browser, address)
    assert visible(browser, "oblivious") == "94.0 %"
    assert visible(browser, "adaptive") == "0.3 %"
    assert visible(browser, "clean") == "95.0 %"
    assert visible(browser, "verdict") == "The gradients are masked."
    images = "return [...document.images].map(image => image.naturalWidth)"
    assert browser.execute_script(images) == [8] * 5
    assert browser.find_element("css selector", ".plot svg").size["height"] > 100


def test_no_console_message_and_no_request_but_the_page(browser, address):
    browser.get_log("performance")
    show(browser, address)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    assert address in sent
    assert [url for url in sent if url != address and not url.startswith("data:")] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1280, 1920])
@pytest.mark.parametrize("which", ["address", "address_of_all"])
def test_nothing_sticks_out_at_any_width(browser, request, which, width):
    show(browser, request.getfixturevalue(which), width)
    page = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    content, window = browser.execute_script(page)
    assert width - 20 <= window <= width  # the scroll bar apart
    assert content == window
    inside = """
        const number = document.getElementById(arguments[0]);
        const range = document.createRange(); range.selectNodeContents(number);
        return range.getBoundingClientRect().right <= number.getBoundingClientRect().right + 0.5;
    """
    for number in ("oblivious", "adaptive", "clean"):
        assert browser.execute_script(inside, number)


def test_dark_follows_the_system(browser, address):
    color = "return getComputedStyle(document.body).backgroundColor"
    show(browser, address, scheme="light")
    assert browser.execute_script(color) == "rgb(253, 253, 252)"
    show(browser, address, scheme="dark")
    assert browser.execute_script(color) == "rgb(18, 21, 26)"
