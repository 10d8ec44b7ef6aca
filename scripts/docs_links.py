"""Links of the documentation that leave its folder, which a site has nothing to lead to: their text stays.

Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

import re
from pathlib import PurePosixPath
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:|#)[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    depth = len(PurePosixPath(page.file.src_uri).parts) - 1

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target.startswith("docs/"):  # of a page that is kept outside, such as ARCHITECTURE.md
            return f"[{text}]({target.removeprefix('docs/')})"
        ups = len(target.split("../")) - 1
        return text if ups > depth or target.startswith(("deploy/", "examples/")) else match.group(0)

    return _LINK.sub(replaced, markdown)
