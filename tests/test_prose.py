"""How prose reads, as tests: Args entries that stand alone, sources and names of files that lead somewhere, ASCII.

Each rule is a function from the text of a file to what is wrong with it, so that a planted violation can show that the
rule is able to fail.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("common", "compare", "ps", "worker", "bench", "tests", "examples", "scripts")
TEXT = {".py", ".pyi", ".md", ".proto", ".toml", ".yml", ".yaml", ".txt", ".js", ".css", ".html", ".sh", ".cfg", ".in"}

#: First words of an entry that make it the tail of a sentence whose head is the name: "job: that it will serve."
_TAILS = re.compile(
    r"(?:(?:of|that|how|who|whom|whose|which|why|where|when|while|until|since|because|if|by|in|into|on|onto|at(?! least"
    r"| most)|to|from|with|without|for|between|behind|before|after|under|over|through|as(?! many)|than|or|and|but|also"
    r"|too|there|gives|takes|goes|has|have|had|may|can|must|shall|will|does|do|did|is|are|was|were|hears|makes|gets"
    r"|reads|decides|sums|verifies|builds|raises|returns|evaluates|says|holds|keeps|belongs|tells|means|stands|comes"
    r"|waits|serves|not) )"
)
_SECTION = re.compile(r"(?:Args|Attributes|Raises|Returns|Yields|Source|Cost):")
_ENTRY = re.compile(r"    ([\w*., `]+?): (.*)")

#: What a source may be: a year of a paper, an address, a standard, a page of the manual, a module or file.
_LEADS = re.compile(
    r"\b(?:19|20)[0-9]{2}\b|https?://|arXiv:[0-9]{4}\.[0-9]{4,5}|\b(?:RFC|PEP) [0-9]+|ITU-T|\b[a-z_0-9]+\([1-8]\)"
    r"|\btorch_ps(?:\.\w+)+|\btorch[./]\w|\b(?:accelerate|lightning)/\w|\bdocs/\w+\.md|``\w+(?:/\w+)+\.py``"
)
#: Projects and books that are found by their names.
_PROJECTS = (
    *("DistributedDataParallel", "Paxos", "Raft", "etcd", "OpenSSL", "plotly", "CUDA programming guide"),
    *("FoundationDB", "SPIN", "TLC", "Hogwild", "LevelDB", "click", "``codecs`` module", "optdigits", "fsspec"),
)
#: What leads nowhere, whatever stands beside it.
_NOWHERE = re.compile(r"design section|\bchecks? C[0-9]+|house style|project's own|is ours\b|\bnone\b")
_OURS = re.compile(
    r"(?<![\w/.:-])((?:ps|worker|common|compare|docs|tests|bench|proto|scripts|deploy|examples)/[\w./-]*\.(?:py|md|proto|sh"
    r"|ya?ml|txt|html|js|css))(?![\w/])"
)
_MODULE = re.compile(r"\btorch_ps((?:\.[a-z_0-9]+)+)")
_BARE = re.compile(r"(?<![\w/.])(\w+\.py)\b")
#: Files of users and of other projects that prose names.
_OF_USERS = {"_state.py", "my_codecs.py", "script.py", "setup.py", "train.py"}


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def prose(source: str) -> str:
    """Docstrings and comments of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*docstrings(source), *(each.string for each in tokens if each.type == tokenize.COMMENT)])


def tails(source: str) -> set[str]:
    """Entries of Args and Attributes that do not stand alone."""
    found: set[str] = set()
    for text in docstrings(source):
        section = ""
        for line in text.splitlines():
            if _SECTION.match(line):
                section = line
            elif line and not line.startswith(" "):
                section = ""
            entry = _ENTRY.match(line) if section in ("Args:", "Attributes:") else None
            if entry and _TAILS.match(entry[2] + " "):
                found.add(f"{entry[1]}: {entry[2]}")
    return found


def sources_to_nowhere(source: str) -> set[str]:
    """Paragraphs behind "Source:" that name no paper, standard, address, manual page, project or file of ours."""
    found: set[str] = set()
    for text in docstrings(source):
        for paragraph in re.findall(r"^Source: (.*?)(?:\n\n|\Z)", text, re.M | re.S):
            leads = _LEADS.search(paragraph) or any(name in paragraph for name in _PROJECTS)
            if _NOWHERE.search(paragraph) or not leads:
                found.add(" ".join(paragraph.split()))
    return found


def missing_files(text: str) -> set[str]:
    """Files and modules of ours that a text names and that do not exist."""
    found = {name for name in _OURS.findall(text) if "*" not in name and not (ROOT / name).exists()}
    found |= {name for name in _BARE.findall(text) if name not in _OF_USERS and name not in _file_names()}
    for name in _MODULE.findall(text):
        parts = name.strip(".").split(".")
        if parts[0] in ("common", "compare", "ps", "worker") and not _is_module_or_name_in_one(parts):
            found.add(f"torch_ps{name}")
    return found


@functools.cache
def _file_names() -> set[str]:
    return {path.name for folder in CODE for path in (ROOT / folder).rglob("*.py")}


def _is_module_or_name_in_one(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    above = path.parent.with_suffix(".py")
    return above.exists() and bool(re.search(rf"\b{parts[-1]}\b", above.read_text(encoding="utf-8")))


def non_ascii(text: str) -> set[str]:
    return {ascii(character) for character in text if not character.isascii()}


def files(folders: Iterable[str], endings: set[str]) -> list[Path]:
    """Every file of these folders that people write; "" is the top folder alone."""
    found = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*") if folder else ROOT.glob("*"))
        if path.suffix in endings and path.is_file()
    ]
    return [path for path in found if "pb" not in path.parts]


def code() -> list[Path]:
    return [*files(CODE, {".py"}), ROOT / "torch_ps" / "__init__.py"]


def broken(rule: Callable[[str], set[str]], paths: Iterable[Path]) -> str:
    """One line for each violation."""
    lines = [
        f"{path.relative_to(ROOT)}: {wrong}"
        for path in paths
        for wrong in sorted(rule(path.read_text(encoding="utf-8")))
    ]
    return "\n".join(lines)


def test_each_args_entry_stands_alone() -> None:
    assert broken(tails, code()) == ""


def test_each_source_leads_somewhere() -> None:
    assert broken(sources_to_nowhere, code()) == ""


def test_each_file_that_is_named_exists() -> None:
    assert broken(lambda source: missing_files(prose(source)), code()) == ""
    assert broken(missing_files, files(("", "docs"), {".md"})) == ""


def test_each_text_is_ascii() -> None:
    texts = [*files(("", *CODE, "docs", "proto", "deploy", ".github"), TEXT), ROOT / "torch_ps" / "__init__.py"]
    assert broken(non_ascii, texts) == ""


def documented(section: str, entry: str) -> str:
    return f'def f() -> None:\n    """Do it.\n\n    {section}:\n        {entry}\n    """\n'


@pytest.mark.parametrize(
    "entry",
    [
        "job: that it will serve.",
        "device: of all tensors.",
        "access: how it is spoken to.",
        "voter: by whom it is asked.",
        "seconds, lease: in which it has to.",
        "model: gives the names.",
        "*args: as in torch.",
    ],
)
@pytest.mark.parametrize("section", ["Args", "Attributes"])
def test_planted_tail_of_a_sentence_is_seen(section: str, entry: str) -> None:
    assert tails(documented(section, entry)) == {entry}


@pytest.mark.parametrize(
    "entry",
    [
        "access: TLS and token settings.",
        "count: at least 1.",
        "world: number of workers, of which each has a rank.",
        "seconds: longest wait, > 0.",
    ],
)
def test_entry_that_stands_alone_is_left_alone(entry: str) -> None:
    assert tails(documented("Args", entry)) == set()
    assert tails(documented("Returns", "tails: of sentences are no entries here.")) == set()


@pytest.mark.parametrize(
    "source",
    ["house style of this project.", "design section 4; Li et al., OSDI 2014.", "see each class.", "none; it is ours."],
)
def test_planted_source_that_leads_nowhere_is_seen(source: str) -> None:
    assert sources_to_nowhere(f'"""A module.\n\nSource: {source}\n"""') == {source}


@pytest.mark.parametrize(
    "source",
    ["Lamport, 1978.", "RFC 8446.", "dup2(2).", "https://grpc.io/.", "``ps/core/ledger.py``.", "docs/modes.md."],
)
def test_source_that_leads_somewhere_is_left_alone(source: str) -> None:
    assert sources_to_nowhere(f'"""A module.\n\nSource: {source}\n"""') == set()


@pytest.mark.parametrize("name", ["ps/gone.py", "docs/gone.md", "gone_file.py", "torch_ps.common.gone"])
def test_planted_name_of_a_file_that_does_not_exist_is_seen(name: str) -> None:
    for text in (f'"""See ``{name}``."""\n', f"x = 1  # as {name} does\n"):
        assert missing_files(prose(text)) == {name}
    assert missing_files(prose(f"x = {name!r}\n")) == set()


def test_names_of_files_that_exist_are_left_alone() -> None:
    text = "``ps/core/shard.py``, docs/modes.md, shard.py, torch_ps.common.errors.PsError, torch_ps.ps.core, train.py"
    assert missing_files(text) == set()


def test_planted_character_is_seen() -> None:
    assert non_ascii("caf\u00e9") == {"'\\xe9'"}
