"""A headless Chromium and the few things that tests of pages do with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
FLAGS = (*QUIET, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage")
#: Seconds that a busy machine gets for what takes a frame.
PATIENCE = 60


class Browser:
    """One for a module of tests; ``driver.quit()`` ends it."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme_ = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_)
        self.driver.get("about:blank")
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(page.as_uri())
        self.becomes("document.documentElement.dataset.drawn", "yes")
        self.becomes("[...document.querySelectorAll('.plot')].every((each) => each.querySelector('.main-svg'))", True)

    def js(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def becomes(self, expression: str, value: object) -> None:
        """Wait until an expression has a value: what follows a click or another medium is done in a later frame."""
        self.until(lambda: self.js(expression), value, expression)

    def until(self, look: Callable[[], object], value: object, what: str = "it") -> None:
        """Wait until what ``look`` returns is ``value``; the last that it returned is in the error."""
        seen: list[object] = []

        def same(_: Any) -> bool:
            seen[:] = [look()]
            return bool(seen[0] == value)

        try:
            WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02).until(same)
        except TimeoutException:
            raise AssertionError(f"{what} is {seen[0]!r} and never became {value!r}") from None

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, key: str) -> None:
        """A key, such as "ENTER", where the focus is."""
        self.driver.switch_to.active_element.send_keys(getattr(Keys, key))

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.js("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)
        return found

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Addresses of all requests since ``open``, of any tab, except the browser's own pages."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        return {address for address in sent if not address.startswith(("chrome:", "data:", "blob:"))}

    def shows(self, selector: str, texts: list[str]) -> None:
        """Wait until these are the texts of the elements."""
        self.until(lambda: self.texts(selector), texts, selector)

    def plots(self, plot: str, names: list[str]) -> None:
        """Wait until a plot shows these runs."""
        self.until(lambda: self.shown(plot), names, plot)

    def shown(self, plot: str) -> list[str]:
        """Names of the runs in a plot, each once, in order."""
        names: list[str] = self.js(f"document.getElementById('plot-{plot}').data.map((trace) => trace.name)")
        return list(dict.fromkeys(names))
