"""The report's page in a real browser: it shows what the data says and requests nothing else.

Nothing in the data is run as code.
"""

import json
import os
import shutil

import pytest

from stanford_alpaca.evaluation.comparison import CANNOT_MEASURE
from stanford_alpaca.evaluation.page import render

NAMES = ("chromium", "chromium-browser", "google-chrome")
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
PIECES = {0: "</s>", 1: " Paris", 2: " Rome", 3: NASTY}
MANY = 300  # samples


def token(place, text, p, nll, emo):
    top = [[place, p, 0.0], [2, 0.9 - p, 0.5]]
    return {
        "id": place,
        "text": text,
        "nll": nll,
        "emo": emo,
        "p": p,
        "rank": 1,
        "mean_cost": 1.0,
        "top": top,
        "rest": [0.1, emo - (0.9 - p) * 0.5],
    }


def view(p):
    """Returns a transport view of two records with three tokens each."""
    records = [
        [
            token(1, "It is Paris", p, 1.25, 0.5),
            token(3, NASTY, p, 4.0 + k, 0.75),
            token(0, "", p, 0.25, 0.5),
        ]
        for k in (0, 1)
    ]
    return {
        "tokens": 50,
        "records": records,
        "pieces": PIECES,
        "neighbours": {i: [[2, 0.125]] for i in PIECES},
    }


def sample(i):
    """Returns a record with one answer of the first run and two of the second.

    The first run's answer is right if ``i`` is odd. The second run's first answer is right if 3
    divides ``i``, and its second answer is wrong.
    """
    wrong = "A red fish." if i % 3 else "A blue fish."
    return {
        "instruction": f"Question q{i:03}",
        "input": NASTY,
        "reference": "A blue fish.",
        "decoding": "greedy",
        "responses": ["A blue fish." if i % 2 else NASTY, [wrong, "Another."]],
    }


DATA = {
    "version": "0",
    "runs": [
        {"name": NASTY, "path": NASTY, "flags": {}, "curves": None, "model": True},
        {
            "name": "emo",
            "path": "out/emo",
            "flags": {"mode": "emo"},
            "model": True,
            "curves": {
                "loss": [[2, 3.0], [4, 1.5]],
                "learning_rate": [[2, 1e-4], [4, 0.0]],
                "eval_loss": [[4, 1.25]],
            },
        },
    ],
    "evaluation": {
        "data": NASTY,
        "records": MANY,
        "pairs": [[1, 0]],
        "rows": [
            {
                "measure": "nll",
                "better": -1,
                "cells": [[2.0, 1.5, 2.5], [1.0, 0.5, 1.5]],
                "references": None,
                "best": 1,
            },
            {
                "measure": "rouge_l (greedy)",
                "better": 1,
                "cells": [None, [0.5, 0.5, 0.5]],
                "references": None,
                "best": None,
            },
        ],
        "differences": [
            {
                "measure": "nll",
                "better": -1,
                "cells": [{"mean": -1.0, "low": -1.5, "high": -0.5, "p": 0.01, "verdict": "seen"}],
            },
            {
                "measure": "mauve",
                "better": 1,
                "cells": [
                    {"mean": 0.1, "low": 0.05, "high": 0.2, "p": 0.01, "verdict": CANNOT_MEASURE}
                ],
            },
        ],
        "curves": [
            None,
            {
                "temperature": [0.5, 1.0, 2.0],
                "entropy": [1.0, 2.0, 4.0],
                "nll": [3.0, 2.0, 2.5],
                "emo": [0.5, 0.6, 0.7],
            },
        ],
        "temperatures": [1.0, 1.0],
        "notes": [NASTY],
    },
    "samples": [sample(i) for i in range(MANY)] + [sample(1) | {"decoding": "beam"}],
    "transport": {
        "records": [
            {"instruction": NASTY, "input": "", "reference": ""},
            {"instruction": "b", "input": "", "reference": ""},
        ],
        "runs": [view(0.5), view(0.25)],
    },
}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(DATA))
    return file


@pytest.fixture
def open_page(browser, file):
    """Returns a function that opens the page with the given browser options.

    At the end it checks that the page raised no error and requested only the file.
    """
    wrong, asked, contexts = [], [], []

    def open_(**options):
        contexts.append(
            browser.new_context(
                **{"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"} | options
            )
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    open_.wrong = wrong
    yield open_
    for context in contexts:
        context.close()
    assert not wrong and asked == [file.as_uri()] * len(contexts)


def test_what_the_data_holds_stays_text(open_page):
    page = open_page()
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert page.locator(".sample .input").first.inner_text() == NASTY
    assert NASTY in page.locator("h1").inner_text() and NASTY in page.title()
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = true'})"
    assert page.evaluate(f"document.body.append({script}) ?? window.ran ?? 'refused'") == "refused"
    assert "Content Security Policy" in open_page.wrong.pop()


def test_search_and_filters_change_the_rows_and_long_lists_come_in_parts(open_page):
    page = open_page()
    rows, status = page.locator(".sample"), page.locator(".status")

    def found():
        return status.inner_text()

    assert rows.count() == 20 and found() == "300 of 300 records"
    page.get_by_role("button", name="Show 20 more").first.click()
    assert rows.count() == 40 and page.evaluate("document.activeElement.innerText").startswith(
        "Question q020"
    )
    page.get_by_label("Search").fill("QUESTION Q29")
    assert (
        found() == "10 of 300 records"
        and rows.count() == 10
        and page.locator("#responses .more").is_hidden()
    )
    page.get_by_label("none right").check()
    assert found() == "4 of 300 records"
    assert rows.locator("h3").all_inner_texts() == [f"Question q{i}" for i in (290, 292, 296, 298)]
    page.get_by_label("Search").fill("")
    page.get_by_label("some right").check()
    assert found() == "200 of 300 records"
    page.get_by_label("beam").check()
    assert found() == "1 of 1 record"


def test_differences_are_marked_against_the_reference_or_the_first_run(open_page):
    page = open_page()
    page.get_by_label("Search").fill("q001")
    second = page.locator(".sample .answer").nth(2).locator("p").first
    assert second.locator("del").all_inner_texts() == ["blue"] and second.locator(
        "ins"
    ).all_inner_texts() == ["red"]
    assert page.locator(".sample .equal").count() == 1
    page.get_by_label("Search").fill("q002")
    page.locator('input[name="against"][value="first"]').check()
    assert page.locator(".answer").nth(1).locator("ins, del").count() == 0
    # texts that have too little in common are shown as they are
    assert page.locator(".answer").nth(2).locator("ins, del").count() == 0
    page.get_by_label("nothing").check()
    assert page.locator("ins, del").count() == 0


def test_the_transport_view_shows_a_token_and_arrow_keys_move(open_page):
    page = open_page()
    chosen = page.locator('.token[aria-selected="true"]')

    def panel():
        """Checks that the shown products add up to the shown sum, and returns the nll and emo."""
        figures = page.locator(".figures dd").all_inner_texts()
        products = page.locator(".meter.product").evaluate_all(
            "cells => cells.map(cell => Number(cell.dataset.value))"
        )
        total = page.locator("tfoot [data-value]").evaluate("cell => Number(cell.dataset.value)")
        assert sum(products) == pytest.approx(total)
        return figures[:2]

    # The worst token of the first record is chosen.
    assert chosen.inner_text() == NASTY and panel() == ["4.000", "0.7500"]
    assert page.locator(".meter.p").evaluate_all(
        "cells => cells.map(cell => Number(cell.dataset.value))"
    ) == [0.25, 0.65, 0.1]
    chosen.focus()
    page.keyboard.press("ArrowLeft")
    assert chosen.inner_text() == "It is Paris" and panel() == ["1.250", "0.5000"]
    assert page.locator(".nearest li").inner_text().split() == ["Rome", "0.1250"]
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # into the next record
    assert (
        chosen.get_attribute("data-record") == "1"
        and page.evaluate("document.activeElement.dataset.token") == "0"
    )
    page.keyboard.press("ArrowUp")
    assert chosen.get_attribute("data-record") == "0"
    heat = "option => option.style.getPropertyValue('--heat')"
    assert float(page.locator(".token").nth(1).evaluate(heat)) == pytest.approx(0.75**0.5, abs=1e-3)
    page.locator('input[name="transport-by"][value="nll"]').check()
    assert float(page.locator(".token").nth(1).evaluate(heat)) == pytest.approx(
        (4 / 6) ** 0.5, abs=1e-3
    )
    page.get_by_label("worst token first").check()
    assert (
        page.locator(".token").first.get_attribute("data-record")
        == "1"
        == chosen.get_attribute("data-record")
    )
    page.get_by_label("as in the data").check()
    dots = page.locator(".map circle")
    assert dots.count() == 6 and page.locator(".chosen-dot").get_attribute("data-record") == "0"
    page.locator('.map [data-record="1"][data-token="1"]').click()
    assert chosen.get_attribute("data-record") == "1" and chosen.inner_text() == NASTY
    page.locator('.others button[aria-pressed="false"]').click()
    assert page.locator(".meter.p").first.get_attribute("data-value") == "0.5"


def test_the_tables_mark_what_is_sure(open_page):
    page = open_page()
    best = page.locator("td.best")
    assert best.count() == 1 and best.text_content().startswith("1.000 (best)")
    assert page.locator("td.better").inner_text().startswith("\u22121.000")
    assert (
        page.locator("td.better .verdict").inner_text() == "better"
        and page.locator(".group").inner_text() == "Responses: greedy"
    )


def test_what_cannot_be_measured_is_not_called_better_and_verdicts_are_shown(open_page):
    page = open_page()
    row = page.locator("tr", has_text="mauve")
    assert "cannot measure" in row.inner_text() and row.locator(".better").count() == 0
    assert "seen" in page.locator("td.better").inner_text()
    assert page.locator("#measures .note").first.inner_text() == NASTY


def test_curves_over_temperatures_are_drawn_against_entropy(open_page):
    page = open_page()
    charts = page.locator('#measures figure svg[role="img"]')
    assert charts.count() == 2 and page.locator("#measures polyline").count() == 2
    points = charts.first.locator("polyline").get_attribute("points").split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert (x1 - x0) * 2 == pytest.approx(x2 - x1, abs=0.2)  # entropies 1, 2 and 4
    assert (y1 - y0) == pytest.approx(2 * (y1 - y2), abs=0.2)  # nll 3, 2 and 2.5, downwards
    ring = charts.first.locator("circle")
    assert float(ring.get_attribute("cx")) == pytest.approx(x1, abs=0.1)
    assert ring.locator("title").text_content() == (
        "emo at temperature 1.000: entropy 2.000, nll 2.000"
    )


def test_curves_tell_their_values_and_can_be_hidden(open_page):
    page = open_page()
    loss = page.get_by_role("slider", name="Loss by step")
    assert page.locator("#training figcaption").all_inner_texts() == ["Loss", "Learning rate"]
    loss.focus()
    assert loss.get_attribute("aria-valuetext") == "step 4: emo 1.500, held out 1.250"
    page.keyboard.press("ArrowLeft")
    assert loss.get_attribute("aria-valuetext") == "step 2: emo 3.000"
    page.locator(".legend").click()
    assert (
        loss.locator("polyline").count() == 0
        and page.locator(".legend").get_attribute("aria-pressed") == "false"
    )


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const layers = [];
    for (; node; node = node.parentElement) layers.unshift(getComputedStyle(node).backgroundColor);
    canvas.fillStyle = "#fff"; canvas.fillRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return luminance(`rgb(${r}, ${g}, ${b})`);
  };
  for (const option of document.querySelectorAll(".token")) option.style.setProperty("--heat", 1);
  const seen = {};
  for (const node of document.querySelectorAll("main *, .bar *, footer")) {
    const own = [...node.childNodes].some((child) => \
child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("svg, .hidden, [hidden], noscript") || \
!node.getClientRects().length) continue;
    const [a, b] = [luminance(getComputedStyle(node).color), behind(node)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${node.tagName}.${node.className}`;
    seen[name] = Math.min(seen[name] ?? 99, ratio);
  }
  return seen;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_page, scheme):
    page = open_page(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for by in ("emo", "nll"):
        page.locator(f'input[name="transport-by"][value="{by}"]').check()
        ratios = page.evaluate(CONTRAST)
        assert (
            len(ratios) > 30
            and {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
        )
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_it_fits_a_phone_and_works_by_keyboard(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator(".token").nth(3).tap()
    assert page.locator('.token[aria-selected="true"]').get_attribute("data-record") == "1"
    unnamed = (
        "nodes => nodes.filter((node) => "
        "!(node.labels?.length || node.textContent.trim() || node.ariaLabel)).length"
    )
    assert page.locator("button, input, [role=slider]").evaluate_all(unnamed) == 0


def test_what_is_missing_is_said(browser, tmp_path):
    file = tmp_path / "bare.html"
    runs = [{"name": "out", "path": "out", "flags": {}, "curves": None, "model": False}]
    file.write_text(
        render(
            {"version": "0", "runs": runs, "evaluation": None, "samples": None, "transport": None}
        )
    )
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.locator(".content .note").count() == 4
    assert json.loads(page.locator("#data").text_content())["runs"] == runs
    page.close()


ROW = {"source": "/a/train.json", "record": 1, "tokens": 3, "nll": 2.0, "emo": 0.5, "ratio": 0.25}
MORE = {"distance": 0.6, "kind": NASTY, "suspicious": False, "weight": {"emo": 1.0, "emo2": 2.0}}
READ = {
    "lines": [NASTY, "suspicious labels: 1"],
    "rows": [ROW | MORE | {"record": n, "nll": float(n % 50)} for n in range(1, 61)],
    "shown": [6, 2],
    "near": 0.8,
    "duplicates": {
        "exact": [[["a.json", n], [NASTY, 2]] for n in range(30)],
        "conflicting": [],
        "near": [[["a.json", 1], ["b.json", 2], 0.9]],
    },
}
READ["rows"][6] |= {"suspicious": True}
TRIED = {"title": NASTY, "head": ["", "nll"], "rows": [["mle", NASTY], ["emo", "1.5"]]}


@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_of_data_has_its_own_sections_alone(browser, tmp_path, width):
    data = DATA | {"sections": ["records", "transport"], "records": READ, "evaluation": None}
    data |= {"runs": DATA["runs"][:1], "transport": DATA["transport"] | {"runs": [view(0.5)]}}
    (tmp_path / "page.html").write_text(render(data))
    page, wrong = browser.new_page(viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("nav a").all_inner_texts() == ["Records", "Transport"]
    assert page.locator("main section").count() == 2 and page.locator("img").count() == 0
    records = page.locator("#records tbody tr")
    assert records.count() == 20 and records.first.locator("th").inner_text() == (
        "train.json, record 7"
    )
    assert records.first.locator("td").last.inner_text() == "suspicious label"
    page.locator("#records .more").click()
    assert records.count() == 40
    page.get_by_label("nll", exact=True).first.check(force=True)
    assert records.first.locator("th").inner_text() == "train.json, record 49"
    assert "and 10 more" in page.locator("#records").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width and not wrong
    page.close()


def test_a_comparison_of_losses_stands_above_the_report(browser, tmp_path):
    sections = ["bench", "training", "measures", "responses", "transport"]
    data = DATA | {"sections": sections, "bench": {"lines": [NASTY], "tables": [TRIED]}}
    (tmp_path / "page.html").write_text(render(data))
    page, wrong = browser.new_page(viewport={"width": 360, "height": 800}), []
    page.on("console", lambda message: wrong.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("#bench td").all_inner_texts() == [NASTY, "1.5"]
    assert page.locator("nav a").count() == 5 and page.locator("#records").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not wrong
    page.close()
