"""report.html: one page that contains all it shows and makes no request.

Rules of this file
  1. Styles, scripts, plotly.js and the results are inlined. A content security policy in the page forbids every
     request, so that a mistake shows on the browser's console.
  2. Text of the user enters the page in two ways only: escaped in the title, and as JSON that scripts put into text
     nodes. Markup in a run's text stays text.
  3. plotly, an optional dependency, is imported only when a report is written.

    template/report.html
      {{STYLE}}    report.css
      {{RESULTS}}  results.json and the sentences, as <script type="application/json">
      {{PLOTLY}}   plotly.min.js of the installed plotly package
      {{SCRIPT}}   looks.js figures.js thrift.js charts.js table.js page.js

Source: https://plotly.com/javascript/ draws the charts; colours by Okabe and Ito, 2008, for every colour vision.
"""

from __future__ import annotations

import html
import json
import re
from importlib import resources, util
from pathlib import Path

from torch_ps.common.errors import ConfigError
from torch_ps.compare.headline import bytes_sentence, headline
from torch_ps.compare.results import Results, to_json
from torch_ps.compare.terminal_table import caption

SCRIPTS = ("looks.js", "figures.js", "thrift.js", "charts.js", "table.js", "page.js")
MISSING = "report.html needs plotly; install it with: pip install torch-ps[compare]"

_MARK = re.compile(r"\{\{([A-Z]+)\}\}")


def can_write_report() -> bool:
    """Whether plotly is installed, without importing it."""
    return util.find_spec("plotly") is not None


def write(results: Results, path: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: plotly is not installed.
    """
    path.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The page as HTML.

    Raises:
        ConfigError: plotly is not installed.
    """
    parts = {
        "TITLE": html.escape(f"{results.task}: " + ", ".join(run.name for run in results.runs)),
        "STYLE": _template("report.css"),
        "RESULTS": embedded(results),
        "PLOTLY": _plotly(),
        "SCRIPT": "\n".join(_template(name) for name in SCRIPTS),
    }
    return _MARK.sub(lambda mark: parts[mark[1]], _template("report.html"))


def embedded(results: Results) -> str:
    """The results and the sentences about them, as JSON without characters that HTML treats as markup."""
    record = json.loads(to_json(results))
    record["sentences"] = {
        "headline": headline(results),
        "bytes": bytes_sentence(results),
        "caption": caption(results),
    }
    text = json.dumps(record, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(MISSING) from error
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _template(name: str) -> str:
    return (resources.files("torch_ps.compare") / "template" / name).read_text(encoding="utf-8")
