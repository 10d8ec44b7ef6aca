"""The page in a real browser: no error, no request, and every switch does what it says."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.compare.browser import CHROMIUM, DRIVER, Browser
from tests.compare.golden import golden
from tests.compare.test_page import HOSTILE
from tests.compare.test_runs import EVERY_KIND
from torch_ps.compare import report
from torch_ps.compare.results import Failure, Results, RunResult, Staleness
from torch_ps.compare.runs import parse_runs
from torch_ps.compare.seeds import merge_seeds

NAMES = ["sync fp32", "sync fp16", "async fp32", "async fp16"]

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


def page_of(results: Results, folder: Path) -> Path:
    report.write(results, folder / "report.html")
    return folder / "report.html"


def plots(browser: Browser) -> list[str]:
    found: list[str] = browser.js("[...document.querySelectorAll('.plot')].map((each) => each.id.slice(5))")
    return found


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_the_page_opens_without_error_or_request(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    page = page_of(golden(), tmp_path)
    browser.open(page, width=width, scheme=scheme)
    assert browser.texts("h1") == [json.loads(report.embedded(golden()))["sentences"]["headline"]]
    ids = ["loss-seconds", "loss-samples", "thrift", "explore", "staleness", "worker-time", "throughput", "bytes"]
    assert plots(browser) == ids
    for plot in ids:
        assert browser.shown(plot) == NAMES
        assert browser.js(f"document.querySelectorAll('#plot-{plot} .main-svg').length") > 0
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert browser.js("getComputedStyle(document.body).backgroundColor") != (
        "rgb(245, 246, 248)" if scheme == "dark" else "rgb(14, 18, 24)"
    )
    assert browser.problems() == []
    assert browser.requests() == {page.as_uri()}


def test_one_click_hides_a_run_everywhere_and_another_brings_it_back(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    rest = [name for name in NAMES if name != "sync fp16"]
    browser.click("button[data-run='sync fp16']")
    for plot in plots(browser):
        browser.plots(plot, rest)
    browser.shows("#runs-table tr.hidden-run .run-name", ["sync fp16"])
    browser.becomes("document.querySelector(\"[data-run='sync fp16']\").getAttribute('aria-pressed')", "false")
    colours = browser.js("document.getElementById('plot-loss-seconds').data.map((trace) => trace.line?.color)")
    browser.press("SPACE")  # a switch keeps the focus
    browser.becomes("document.querySelectorAll('[aria-pressed=true][data-run]').length", len(NAMES))
    browser.press("SPACE")
    browser.plots("bytes", rest)
    browser.click("#show-all")
    browser.plots("bytes", NAMES)
    browser.plots("loss-seconds", NAMES)
    again = browser.js("document.getElementById('plot-loss-seconds').data.map((trace) => trace.line?.color)")
    assert [again[0], *again[2:4]] == colours[:3], "a run keeps its colour"
    assert browser.problems() == []


def test_all_runs_can_be_hidden(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    for name in NAMES:
        browser.click(f"button[data-run='{name}']")
    browser.plots("staleness", [])
    browser.plots("bytes", [])
    assert browser.problems() == []


def test_a_click_on_a_heading_sorts_best_first_then_last_then_as_run(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    heading = "#runs-table th:nth-child(4) button"
    assert browser.texts(heading) == ["To targetseconds"]
    times = {run.name: run.seconds_to_target or 0.0 for run in golden().runs}
    fastest = sorted(times, key=times.__getitem__)
    browser.click(heading)
    browser.shows("#runs-table tbody .run-name", fastest)
    browser.becomes("document.querySelector('#runs-table th:nth-child(4)').getAttribute('aria-sort')", "ascending")
    browser.click(heading)
    browser.shows("#runs-table tbody .run-name", fastest[::-1])
    browser.click(heading)
    browser.shows("#runs-table tbody .run-name", NAMES)


def test_the_table_of_workers_sorts_in_the_same_way_and_by_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    heading, cells = "#workers-table th:nth-child(7)", "#workers-table td:nth-child(7)"
    assert browser.texts(heading) == ["Waitingseconds"]
    as_run = [worker.wait_seconds for run in golden().runs for worker in run.workers_detail]
    browser.click(f"{heading} button")
    for seconds, order in ((sorted(as_run), "ascending"), (sorted(as_run, reverse=True), "descending"), (as_run, None)):
        browser.shows(cells, [f"{each:.{2 if each < 10 else 1}f}" for each in seconds])
        browser.becomes(f"document.querySelector('{heading}').getAttribute('aria-sort')", order)
        browser.press("ENTER")
    browser.click("#workers-table th:nth-child(2) button")
    browser.shows("#workers-table td:first-child", [*NAMES, *NAMES])  # the name of a run, wherever another stands above
    assert browser.js("document.querySelector('#runs-table [aria-sort]')") is None, "each table has its own order"
    assert browser.problems() == []


def test_a_run_leads_to_the_command_that_repeats_it(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    shown = (
        "[...document.querySelectorAll('.of-run')].filter((each) => each.checkVisibility() && each.matches(':target'))"
    )
    for run in golden().runs[1:3]:
        browser.js("scrollTo(0, 0)")  # a link that is behind the toolbar cannot be clicked
        browser.driver.find_element("link text", run.name).click()
        browser.becomes(f"{shown}.map((each) => each.querySelector('pre').textContent)", [run.command])
    browser.click("details summary")
    browser.js("scrollTo(0, 0)")
    browser.driver.find_element("link text", run.name).click()
    browser.becomes(f"{shown}.length", 1)
    assert browser.problems() == []


def test_the_best_value_of_a_column_is_bold_where_one_is_better(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    pushed, pulled = "#runs-table td:nth-child(8) .best", "#runs-table td:nth-child(9) .best"
    assert len(browser.texts(pushed)) == 2, "both fp16 runs push the same bytes, half of the others"
    assert browser.texts(pulled) == [], "all pull alike"
    assert browser.texts("#tiles .tile:last-child .run-name") == ["sync fp16", "async fp16"]


def test_a_value_that_is_missing_sorts_last_both_ways(browser: Browser, tmp_path: Path) -> None:
    first, *rest = golden().runs
    results = replace(golden(), runs=[replace(first, seconds_to_target=None, validation_loss=None), *rest])
    browser.open(page_of(results, tmp_path))
    for order in ("ascending", "descending"):
        browser.click("#runs-table th:nth-child(4) button")
        browser.becomes("document.querySelector('#runs-table th:nth-child(4)').getAttribute('aria-sort')", order)
        assert browser.texts("#runs-table tbody .run-name")[-1] == first.name
    assert browser.problems() == []


@pytest.mark.parametrize(("width", "told"), [(1280, 4), (400, 1)])
def test_the_pointer_shows_the_values_of_all_runs_and_of_one_where_there_is_no_room(
    browser: Browser, tmp_path: Path, width: int, told: int
) -> None:
    browser.open(page_of(golden(), tmp_path), width=width)
    box = (
        "(e => (e.scrollIntoView({block: 'center'}), e.getBoundingClientRect()))(document.querySelector(arguments[0]))"
    )
    place = browser.js(
        f"(({{x, y, width, height}}) => [x + 0.6 * width, y + 0.7 * height])({box})", "#plot-loss-samples"
    )
    for by in (-2, 0):
        moved = {"type": "mouseMoved", "x": place[0] + by, "y": place[1]}
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
    rows = "#plot-loss-samples .hoverlayer :is(.legendtext, .hovertext)"
    browser.becomes(f"document.querySelectorAll('{rows}').length", told)
    assert sum(any(name in text for text in browser.texts(rows)) for name in NAMES) == told
    assert browser.problems() == []


def test_axis_and_measure_can_be_chosen(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path))
    titles = "['xaxis', 'yaxis'].map((axis) => document.getElementById('plot-explore').layout[axis].title.text)"
    browser.becomes(titles, ["MB pushed and pulled per worker", "validation loss"])
    for axis, title in (("seconds", "wall time (s)"), ("samples", "samples, whole job")):
        browser.click(f"button[data-value='{axis}']")
        browser.becomes(titles, [title, "validation loss"])
    browser.click("button[data-value='training']")
    browser.click("button[data-value='log']")
    browser.becomes(titles, ["samples, whole job", "training loss"])
    browser.becomes("document.getElementById('plot-explore').layout.yaxis.type", "log")
    points = [point.samples for point in golden().runs[0].training]
    browser.becomes("document.getElementById('plot-explore').data[0].x", points)
    assert browser.problems() == []


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    first, *rest = golden().runs
    hostile = replace(first, name=HOSTILE, text=HOSTILE, command=HOSTILE)
    failure = Failure(name=HOSTILE, reason=HOSTILE, log=HOSTILE, command=HOSTILE)
    settings = golden().settings | {"data": HOSTILE, "lr_rule": HOSTILE, "slow": [HOSTILE]}
    results = replace(golden(), task=HOSTILE, settings=settings, runs=[hostile, *rest], failures=[failure])
    page = page_of(results, tmp_path)
    browser.open(page)
    assert browser.js("document.title").startswith(HOSTILE[:10])
    assert browser.js("document.images.length") == 0
    assert browser.texts("#text-list pre")[0] == HOSTILE
    assert browser.texts("#failure-list pre") == [HOSTILE, HOSTILE]
    assert browser.problems() == []
    assert browser.requests() == {page.as_uri()}


def test_accuracy_is_shown_where_there_is_one(browser: Browser, tmp_path: Path) -> None:
    runs = [
        replace(run, validation_accuracy=0.9, curve=[replace(point, accuracy=0.5) for point in run.curve])
        for run in golden().runs
    ]
    browser.open(page_of(replace(golden(), runs=runs), tmp_path))
    assert "accuracy" in plots(browser)
    assert "Validationaccuracy" in browser.texts("#runs-table th")
    browser.click("button[data-value='accuracy']")
    title = "document.getElementById('plot-explore').layout.yaxis.title.text"
    browser.becomes(title, "validation accuracy")
    browser.becomes("document.getElementById('plot-thrift').layout.yaxis.title.text", "validation accuracy")
    assert browser.problems() == []


def test_a_comparison_without_a_finished_run_still_says_why(browser: Browser, tmp_path: Path) -> None:
    failure = Failure(name="sync fp32", reason="ps-run ended with exit code 3", log="log.txt", command="ps-run")
    browser.open(page_of(replace(golden(), runs=[], failures=[failure], target_loss=None), tmp_path))
    assert browser.texts("h1") == ["No run finished."]
    assert browser.texts("#failure-list pre") == ["ps-run ended with exit code 3", "ps-run"]
    assert browser.problems() == []


def eight() -> Results:
    """Runs of every mode and many codecs that all end close together, where names have the least room."""
    template = golden().runs[0]
    runs: list[RunResult] = []
    for index, run in enumerate(parse_runs(EVERY_KIND)):
        size = {"sync sign": 0.5, "local 8 fp32": 0.125, "sync topk:0.01": 0.51}.get(run.name, 1.0)
        curve = [replace(p, bytes=round(size * p.bytes), accuracy=0.9 + 0.001 * index) for p in template.curve]
        runs.append(replace(template, name=run.name, mode=run.mode, compress=run.compress, curve=curve))
    return replace(golden(), runs=runs)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_ends_of_accuracy_against_bytes_are_named_and_no_name_covers_another(
    browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    browser.open(page_of(eight(), tmp_path), width=width, scheme=scheme)
    names = [run.name for run in parse_runs(EVERY_KIND)]
    assert browser.shown("thrift") == names
    assert browser.js("document.getElementById('plot-thrift').layout.xaxis.type") == "log"
    words = browser.js(
        "document.getElementById('plot-thrift').layout.annotations.map((each) => each.text.replaceAll('<br>', ' '))"
    )
    assert words == names
    ends = browser.js("document.getElementById('plot-thrift').data.slice(-8).map((trace) => trace.x)")
    assert ends == [[run.curve[-1].bytes / 1e6] for run in eight().runs]
    boxes = browser.js(
        "[...document.querySelectorAll('#plot-thrift .annotation-text-g')].map((each) => each.getBoundingClientRect())"
        ".map((box) => [box.left, box.top, box.right, box.bottom])"
    )
    assert len(boxes) == len(names)
    for a, b in combinations(boxes, 2):
        assert min(a[2], b[2]) - max(a[0], b[0]) < 2 or min(a[3], b[3]) - max(a[1], b[1]) < 2
    assert all(box[0] >= 0 and box[2] <= width for box in boxes)
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert browser.problems() == []


def test_names_are_placed_again_when_the_window_changes(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(eight(), tmp_path))
    size = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.becomes("window.innerWidth", 700)
    plot = "document.getElementById('plot-thrift')"
    browser.becomes(f"{plot}.layout.width === {plot}.clientWidth && {plot}.clientWidth < 700", True)
    assert browser.problems() == []


def test_runs_of_one_mode_and_different_codecs_look_different(browser: Browser, tmp_path: Path) -> None:
    codecs = ("none", "fp16", "bf16", "int8", "sign", "topk:0.01", "topk:0.001", "randk:0.01")
    runs = [replace(golden().runs[0], name=f"sync {codec}", compress=codec) for codec in codecs]
    browser.open(page_of(replace(golden(), runs=runs), tmp_path))
    looks = browser.js("document.getElementById('plot-loss-samples').data.map((trace) => trace.line.dash)")
    assert len(set(looks)) == len(codecs)


def test_one_late_start_does_not_flatten_the_staleness(browser: Browser, tmp_path: Path) -> None:
    stale = Staleness(mean=1.0, max=98, histogram={"0": 300, "1": 400, "2": 100, "98": 1})
    runs = [replace(run, staleness=stale) for run in golden().runs]
    browser.open(page_of(replace(golden(), runs=runs), tmp_path))
    axis = "document.getElementById('plot-staleness').layout.xaxis"
    assert browser.js(f"{axis}.ticktext") == ["0", "1", "2", "3 to 98"]
    assert browser.js("document.getElementById('plot-staleness').data[0].x") == [0, 1, 2, 3]
    assert browser.problems() == []


def test_print_is_light_and_every_plot_fits_the_paper(browser: Browser, tmp_path: Path) -> None:
    browser.open(page_of(golden(), tmp_path), scheme="dark")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    for plot in plots(browser):
        browser.becomes(f"document.getElementById('plot-{plot}').layout.width", 660)
    browser.becomes("document.getElementById('plot-loss-seconds').layout.font.color", "#172033")
    assert browser.problems() == []


def test_several_seeds_are_bands_that_go_with_their_run(browser: Browser, tmp_path: Path) -> None:
    results = golden()
    worse = [replace(run, curve=[replace(p, loss=(p.loss or 0) + 0.1) for p in run.curve]) for run in results.runs]
    joined = [merge_seeds([run, other], [0, 1]) for run, other in zip(results.runs, worse, strict=True)]
    settings = results.settings | {"seeds": 2, "seed": 0}
    browser.open(page_of(replace(results, runs=joined, settings=settings), tmp_path))
    bands = "document.getElementById('plot-loss-seconds').data.filter((trace) => trace.fill === 'toself').length"
    browser.becomes(bands, len(NAMES))
    browser.click(f"[data-run='{NAMES[0]}']")
    browser.becomes(bands, len(NAMES) - 1)
    assert "\u00b1" in "".join(browser.texts("#runs-table td"))
    assert "mean of 2 seeds" in browser.texts("#chance")[0]
    paper = {"width": 703, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 without its margins
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.becomes("document.querySelector('#runs-table').scrollWidth <= innerWidth - 30", True)
    assert browser.problems() == []
