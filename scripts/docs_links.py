"""MkDocs hook: includes files from outside docs/, and leads or unlinks links that leave that folder.

    --8<-- "ARCHITECTURE.md"              becomes the text of that file, of the root of the repository
    [failover](docs/failover.md)          in such a text, becomes a link to the page
    [train.py](../examples/train.py)      becomes its text alone, since the site has no such file

Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

_ROOT = Path(__file__).parents[1]
_INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#)[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    depth = len(PurePosixPath(page.file.src_uri).parts) - 1

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target.startswith("docs/"):
            return f"[{text}]({target.removeprefix('docs/')})"
        ups = len(target.split("../")) - 1
        return text if ups > depth or target.startswith(("deploy/", "examples/")) else match.group(0)

    return _LINK.sub(replaced, _INCLUDE.sub(lambda match: (_ROOT / match[1]).read_text(encoding="utf-8"), markdown))
