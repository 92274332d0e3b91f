"""A diff's section in a real browser: charts are there, links lead on."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from crosslens.explore import build, rewrite
from tests.explore_diffed import leave, toy, with_course
from tests.explore_run import make_run
from tests.test_explore_browser import a_browser, every, one, opened


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model_folder):
    run = make_run(tmp_path_factory.mktemp("browser"), tiny_model_folder, out="run")
    first = build(run, tokens=2000)
    leave(with_course(toy(latents=48)), run.folder, coder=first.store.manifest.coder)
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
    charts = every(page, "#diff figure svg")
    assert len(charts) == 5
    for chart in charts:
        assert chart.size["width"] > 200
        assert chart.get_attribute("aria-label")
    assert len(every(page, "#diff .point circle")) > 0
    assert every(page, "#diff figcaption .null-2")


def test_a_link_leads_to_the_latent(page):
    link = one(page, "#diff .top-latent a.latent")
    number = int(link.text.removeprefix("Latent "))
    link.click()
    assert one(page, "#latent h2").text == f"Latent {number}"
    assert not one(page, "#diff").is_displayed()
    assert one(page, "tr[aria-current] a").text == str(number)
    facts = one(page, "#latent .stats").text
    assert "only chat" in facts
    assert "decoder cosine" in facts


def test_a_circle_of_the_scatter_leads_to_its_latent(page):
    point = one(page, "#diff a.point")
    label = point.get_attribute("aria-label")
    wanted = int(label.partition(":")[0].removeprefix("Latent "))
    assert "ν of the error" in label
    page.execute_script("arguments[0].focus()", point)
    assert page.switch_to.active_element == point
    point.find_element(By.TAG_NAME, "circle").click()
    assert page.current_url.endswith(f"#latent={wanted}")


def test_latents_that_stand_out_show_their_strongest_examples(page, built):
    shown = every(page, "#diff details[open] .top-latent")
    assert shown
    for article in shown:
        number = int(article.find_element(By.CSS_SELECTOR, "a").text.removeprefix("Latent "))
        strongest = [e.value for e in built.store.examples_of(number) if e.section == 0][:2]
        lines = article.find_elements(By.CSS_SELECTOR, ".example")
        assert [float(line.text.split()[0]) for line in lines] == [
            pytest.approx(value, rel=0.01) for value in strongest
        ]
        assert len(article.find_elements(By.CSS_SELECTOR, ".peak")) == len(lines)


def test_a_life_reaches_from_its_birth_to_its_death(page, built):
    """Of three models: to the second third if there throughout, nowhere if in one alone."""
    lives = every(page, "#diff .course path.life")
    assert {life.get_attribute("class").split("-")[-1] for life in lives} == {
        "shared", "only_a", "only_b", "other",
    }  # fmt: skip
    whole = one(page, "#diff .life-shared").size["width"]
    assert whole > 100
    assert max(life.size["width"] for life in lives) == whole
    counts = [int(each.text) for each in every(page, "#diff .course g > text")]
    assert sum(counts) == 47  # one latent has no course
    link = one(page, "#diff a.latent[href^='#latent=']")
    assert link.is_displayed()


def test_a_narrow_window_scrolls_nowhere_sideways(page):
    page.set_window_size(500, 900)
    try:
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= page.execute_script("return innerWidth")
    finally:
        page.set_window_size(1300, 900)


def test_both_colour_schemes_leave_words_readable(page):
    """Contrast of the quiet text against the ground, by WCAG: 4.5 at least."""
    one(page, "#theme").click()
    for _ in range(2):
        colours = page.execute_script(
            "return [getComputedStyle(document.querySelector('#diff .said')).color,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        low, high = sorted(map(_luminance, colours))
        assert (high + 0.05) / (low + 0.05) > 4.5
        one(page, "#theme").click()


def _luminance(colour: str) -> float:
    parts = [float(each) / 255 for each in colour.strip("rgba()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
