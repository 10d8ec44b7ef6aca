"""The page as text: whole, and safe whatever a run is called or a model writes."""

import builtins
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.compare.golden import golden
from torch_ps.common.errors import ConfigError
from torch_ps.compare import cli, report
from torch_ps.compare.results import Failure, from_json

HOSTILE = (
    '</script><script>document.title="taken"</script><img src=x onerror=\'document.title="taken"\'>&amp; {{STYLE}}'
)


def test_the_page_holds_plotly_and_the_results_once() -> None:
    page = report.page(golden())
    assert page.count("* plotly.js v") == 1
    assert page.count('<script type="application/json" id="results">') == 1
    assert "{{" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_the_page_names_no_other_file_or_host() -> None:
    own = "".join(report._template(name) for name in ("report.html", "report.css", *report.SCRIPTS))
    addresses = set(re.findall(r"https?://[^\s\"']+", own))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, not an address
    assert not re.search(r"<link[^>]+href=\"(?!data:)|<script[^>]+src|@import|url\(", own)
    assert "default-src 'none'" in own


def test_the_results_in_the_page_are_the_results() -> None:
    text = report.embedded(golden())
    assert not set("<>&") & set(text)
    record = json.loads(text)
    sentences = record.pop("sentences")
    assert from_json(json.dumps(record)) == golden()
    assert sentences["headline"].startswith("async fp16 reached loss")


def test_text_of_the_user_never_becomes_markup() -> None:
    first, *rest = golden().runs
    hostile = replace(first, name=HOSTILE, text=HOSTILE, command=HOSTILE)
    failure = Failure(name=HOSTILE, reason=HOSTILE, log=HOSTILE, command=HOSTILE)
    page = report.page(replace(golden(), task=HOSTILE, runs=[hostile, *rest], failures=[failure]))
    assert "<img src=x" not in page
    assert page.count('document.title="taken"') == 0
    assert page.count("</script>") == report.page(golden()).count("</script>")
    title = re.search(r"<title>(.*?)</title>", page)
    assert title is not None
    assert HOSTILE in html.unescape(title[1])


def test_without_plotly_everything_but_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without_plotly(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return load(name, globals, locals, fromlist or (), level)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(ConfigError, match=r"pip install torch-ps\[compare\]"):
        report.page(golden())
    with (tmp_path / "terminal.txt").open("w") as file:
        cli.publish(golden(), tmp_path, Console(file=file, width=100))
    terminal = (tmp_path / "terminal.txt").read_text()
    assert "pip install torch-ps[compare]" in terminal
    assert "async fp16" in terminal
    assert (tmp_path / "results.json").exists()
    assert not (tmp_path / "report.html").exists()
