"""The documentation as a site: it builds without a warning and reads well in a real browser."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.compare.browser import CHROMIUM, DRIVER, Browser
from tests.docs.commands import ROOT

pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver on this machine")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.driver.quit()


def test_every_page_is_in_the_navigation() -> None:
    shown = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    nav = yaml.safe_load(shown)["nav"]
    assert set(_leaves(nav)) == pages


def _leaves(nav: object) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case list():
            for each in nav:
                yield from _leaves(each)
        case dict():
            for each in nav.values():
                yield from _leaves(each)


def test_reference_has_the_public_names(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("ParameterServerOptimizer", "shard", "alone", "Client", "OptimizerSpec", "WaitTimeout"):
        assert f'id="torch_ps.{name}"' in text or f'id="torch_ps.common.errors.{name}"' in text, name
    assert "local_steps" in text


@pytest.mark.parametrize("page", ["index", "api", "machines/kubernetes", "performance"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_is_free_of_errors(site: Path, browser: Browser, page: str, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.driver.get_log("browser")
    browser.driver.get((site / f"{page}.html").as_uri())
    browser.becomes("document.readyState", "complete")
    assert browser.js("document.querySelector('h1').innerText.length > 2")
    assert browser.js("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src)"
    assert browser.js(broken) == []
    errors = [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert [error for error in errors if "search" not in error] == []  # a file has no index to be searched
