"""The interactions' section in a real browser: charts are there, links and labels work."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from crosslens.explore import build, rewrite
from tests.explore_interacted import leave, toy
from tests.explore_run import make_run
from tests.test_explore_browser import a_browser, every, one, opened
from tests.test_explore_diff_browser import _luminance


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model_folder):
    run = make_run(tmp_path_factory.mktemp("browser"), tiny_model_folder, out="run")
    first = build(run, tokens=2000)
    leave(toy(latents=48), run.folder, coder=first.store.manifest.coder)
    assert rewrite(run) == first.report
    return first


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with a_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(browser, built):
    browser.get("about:blank")
    browser.get_log("browser")
    opened(browser, built.report.as_uri())
    return browser


def test_charts_are_there_and_nothing_goes_wrong(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    (chart,) = every(page, "#interact figure svg")
    assert chart.size["width"] > 400
    assert len(every(page, "#interact .bar")) == 3
    assert len(every(page, "#interact .mark circle")) > 0


def test_latents_are_told_by_what_they_are_active_on(page, built):
    labels = every(page, "#interact [data-tokens]")
    shown = set(built.store.alive_L.tolist())
    assert labels
    for label in labels:
        known = int(label.get_attribute("data-tokens")) in shown
        assert bool(label.find_elements(By.CSS_SELECTOR, "bdi, .special")) == known


def test_a_link_leads_to_the_latent_and_its_partners_lead_on(page):
    link = one(page, "#interact a.latent")
    number = link.text
    link.click()
    assert one(page, "#latent h2").text == f"Latent {number}"
    assert not one(page, "#interact").is_displayed()
    partner = one(page, "#latent .partners a")
    other = partner.text
    partner.click()
    assert one(page, "#latent h2").text == f"Latent {other}"
    assert number in [a.text for a in every(page, "#latent .partners a")]


def test_a_circle_leads_to_its_first_latent(page):
    mark = one(page, "#interact a.mark")
    wanted = mark.get_attribute("aria-label").split()[1]
    page.execute_script("arguments[0].focus()", mark)
    assert page.switch_to.active_element == mark
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    mark.find_element(By.TAG_NAME, "circle").click()
    assert page.current_url.endswith(f"#latent={wanted}")


def test_a_narrow_window_scrolls_nowhere_sideways(page):
    page.set_window_size(500, 900)
    try:
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= page.execute_script("return innerWidth")
    finally:
        page.set_window_size(1300, 900)


def test_both_colour_schemes_tell_kinds_from_the_ground(page):
    """Contrast by WCAG: 4.5 for words, 3 for what is drawn."""
    one(page, "#theme").click()
    for _ in range(2):
        ground = _luminance(
            page.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        words, *kinds = page.execute_script(
            "const of = (s, p) => getComputedStyle(s)[p];"
            "return [of(document.querySelector('#interact .said'), 'color'),"
            " ...[...document.querySelectorAll('#interact .bar rect')].map((r) => of(r, 'fill'))]"
        )
        for colour, least in ((words, 4.5), *((kind, 3.0) for kind in kinds)):
            low, high = sorted((_luminance(colour), ground))
            assert (high + 0.05) / (low + 0.05) > least, colour
        one(page, "#theme").click()
