"""The report in a real browser, from `file://`. Chromium must be installed: nothing is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from crosslens.explore import build
from tests.explore_run import HOSTILE, make_run

BROWSER, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--window-size=1300,900",
)


@contextmanager
def a_browser(profile: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With the driver named, selenium looks for none and downloads none.
    driver = Chrome(options=options, service=ChromeService(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model_folder):
    run = make_run(tmp_path_factory.mktemp("browser"), tiny_model_folder, out="run")
    return build(run, tokens=2000)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with a_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(browser, built):
    """The report, freshly opened, its latents unpacked."""
    opened(browser, built.report.as_uri())
    return browser


def opened(browser: Chrome, address: str) -> None:
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 20).until(
        lambda b: b.execute_script("return document.documentElement.dataset.ready === 'true'")
    )


def one(page: Chrome, selector: str):
    return page.find_element(By.CSS_SELECTOR, selector)


def every(page: Chrome, selector: str):
    return page.find_elements(By.CSS_SELECTOR, selector)


def press(page: Chrome, *keys: str) -> None:
    page.switch_to.active_element.send_keys(*keys)


def test_nothing_is_asked_of_a_network_and_nothing_goes_wrong(browser, built):
    browser.get("about:blank")  # what Chromium's own first page asks for is not ours
    browser.get_log("performance")
    browser.get_log("browser")
    latent = int(built.store.alive_L[0])
    opened(browser, f"{built.report.as_uri()}#latent={latent}")
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages
             if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert built.report.as_uri() in [address.partition("#")[0] for address in asked]
    assert {urlsplit(address).scheme for address in asked} <= {"file", "data", "about", "blob"}
    assert [a for a in asked if a.startswith("file")] == [a for a in asked if "report.html" in a]
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_overview_lists_the_living_latents(page, built):
    assert len(every(page, "#latents tbody tr")) == len(built.store.alive_L)
    assert one(page, "#overview").is_displayed()
    assert not one(page, "#latent").is_displayed()
    assert len(every(page, "#overview figure svg[role=img]")) == 6


def test_a_latent_opens_by_its_address(browser, built):
    latent = int(built.store.alive_L[3])
    opened(browser, f"{built.report.as_uri()}#latent={latent}")
    assert one(browser, "#latent h2").text == f"Latent {latent}"
    assert not one(browser, "#overview").is_displayed()
    assert one(browser, "tr[aria-current] a").text == str(latent)
    assert len(every(browser, ".example")) == len(list(built.store.examples_of(latent)))
    assert len(every(browser, ".peak")) == len(every(browser, ".example"))
    assert len(every(browser, ".logits tr")) == 20


def test_an_example_reads_as_its_tokens(browser, built):
    latent = int(built.store.alive_L[3])
    opened(browser, f"{built.report.as_uri()}#latent={latent}")
    shown = [line.get_property("textContent") for line in every(browser, ".line-of-text")]
    vocabulary, whole = built.store.vocabulary, 0
    for line, example in zip(shown, built.store.examples_of(latent), strict=True):
        wanted = "".join(piece.text for piece in vocabulary.pieces(example.token_ids))
        if "\\x" not in wanted:  # the window ends where characters do
            assert line == wanted
            whole += 1
    assert whole > 3


def test_text_stays_text(page, built):
    assert page.title == "run · crosslens"
    assert every(page, "img, iframe, object, embed") == []
    spelled = False
    for latent in built.store.alive_L[:8]:
        page.execute_script("location.hash = arguments[0]", f"latent={latent}")
        WebDriverWait(page, 5).until(lambda b, n=latent: one(b, "#latent h2").text == f"Latent {n}")
        assert every(page, "img, b + i, iframe") == []
        text = page.execute_script("return document.getElementById('latent').textContent")
        spelled = spelled or HOSTILE[:9] in text
    assert spelled
    assert page.title == "run · crosslens"


def test_keys_walk_through_the_list(page):
    listed = [row.text for row in every(page, "#latents tbody a")]
    one(page, "body").send_keys("j")
    assert page.current_url.endswith(f"#latent={listed[0]}")
    one(page, "body").send_keys("j")
    one(page, "body").send_keys("j")
    one(page, "body").send_keys("k")
    assert page.current_url.endswith(f"#latent={listed[1]}")
    assert one(page, "#latent h2").text == f"Latent {listed[1]}"


def test_the_search_finds_tokens_and_numbers(page, built):
    one(page, "body").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    press(page, "jj no such text jj")
    assert every(page, "#latents tbody tr") == []
    assert one(page, "#count").text == f"0 of {len(built.store.alive_L)}"
    press(page, Keys.CONTROL, "a")
    press(page, "i")
    labels = [cell.text.lower() for cell in every(page, "#latents tbody td:nth-child(2)")]
    having = ["i" in label for label in labels]
    assert True in having
    assert having == sorted(having, reverse=True)
    press(page, Keys.CONTROL, "a")
    press(page, str(int(built.store.alive_L[-1])), Keys.ENTER)
    assert one(page, "#latent h2").text == f"Latent {int(built.store.alive_L[-1])}"


def test_the_list_is_sorted_by_what_is_clicked(page, built):
    def column(n: int) -> list[str]:
        return [cell.text for cell in every(page, f"#latents tbody td:nth-child({n})")]

    maxima = [float(text) for text in column(4)]
    assert maxima == sorted(maxima, reverse=True)
    one(page, "th[data-key=id] button").click()
    assert [int(n) for n in column(1)] == built.store.alive_L.tolist()
    assert one(page, "th[data-key=id]").get_attribute("aria-sort") == "ascending"
    one(page, "th[data-key=id] button").click()
    assert [int(n) for n in column(1)] == built.store.alive_L.tolist()[::-1]


def test_a_line_unfolds(browser, built):
    opened(browser, f"{built.report.as_uri()}#latent={int(built.store.alive_L[0])}")
    line = one(browser, ".line-of-text")
    low = line.size["height"]
    line.send_keys(Keys.ENTER)
    assert line.get_attribute("aria-expanded") == "true"
    assert line.size["height"] > low
    assert one(browser, ".where").is_displayed()
    assert ".txt" in one(browser, ".where").text


def test_colours_follow_the_switch(page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    one(page, "#theme").click()
    assert page.execute_script(ground) == "rgb(255, 255, 255)"
    one(page, "#theme").click()
    assert page.execute_script(ground) == "rgb(21, 24, 28)"
    one(page, "#theme").click()
    assert one(page, "#theme").text == "theme: auto"


def test_a_latent_that_is_not_there_is_said(browser, built):
    opened(browser, f"{built.report.as_uri()}#latent=4711")
    assert "Latent 4711 is not on this page" in one(browser, "#latent").text


def test_a_narrow_window_scrolls_nowhere_sideways(page):
    page.set_window_size(500, 900)
    try:
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= page.execute_script("return innerWidth")
    finally:
        page.set_window_size(1300, 900)
