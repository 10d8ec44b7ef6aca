"""What is loaded at run time keeps the rules of ``tests/support/layout.py``, too, as a fresh interpreter shows."""

import json
import subprocess
import sys

import pytest

from tests.support.layout import MAY_IMPORT, PICKLES, ROOT, dotted, sources, within

#: Code in a child of its own: what was loaded after it, and names in our modules that are a module or a function which
#: unpickles. ``fork`` gives every piece of code an interpreter that has loaded nothing, at the price of one start.
PROBE = """
import json, os, sys
PICKLES, before = set(json.loads(sys.argv[2])), set(sys.modules)
def holders():
    for name, module in list(sys.modules.items()):
        if name.startswith("torch_ps"):
            for key, value in vars(module).items():
                is_module = isinstance(value, type(sys))
                home = getattr(value, "__name__", "") if is_module else getattr(value, "__module__", "")
                what = (home, getattr(value, "__name__", ""))
                if str(home).partition(".")[0] in PICKLES or what == ("torch.serialization", "load"):
                    yield f"{name}.{key}"
for code in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        exec(code, {})
        found = {"loaded": sorted(set(sys.modules)), "holders": sorted(holders())}
        os.write(1, (json.dumps(found) + "\\n").encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


def probe(*codes: str) -> list[dict[str, set[str]]]:
    """For each piece of code, what a fresh interpreter has ``loaded`` after it, and the ``holders`` of unpicklers."""
    command = [sys.executable, "-c", PROBE, json.dumps(codes), json.dumps(sorted(PICKLES))]
    lines = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [{key: set(names) for key, names in json.loads(line).items()} for line in lines]


def load_all(folder: str) -> str:
    """Code that imports every module of a folder."""
    return "\n".join(f"import {dotted(path)}" for path in sources(folder) if path.stem != "__main__")


@pytest.fixture(scope="module")
def after() -> dict[str, dict[str, set[str]]]:
    """What each folder, the core and the package load, each in a fresh interpreter; the public names go with worker."""
    codes = {folder: load_all(folder) for folder in (*MAY_IMPORT, "ps/core")}
    codes["torch_ps"] = "import torch_ps"
    codes["worker"] += "\nimport torch_ps\nfor name in torch_ps.__all__: getattr(torch_ps, name)"
    return dict(zip(codes, probe(*codes.values()), strict=True))


def test_loading_the_core_loads_nothing_impure(after: dict[str, dict[str, set[str]]]) -> None:
    loaded = after["ps/core"]["loaded"]
    assert "torch_ps.ps.core" in loaded
    assert loaded & {"grpc", "torch", "numpy", "asyncio", "threading", "random", "socket"} == set()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_loading_a_folder_loads_no_folder_that_it_may_not_see(
    folder: str, after: dict[str, dict[str, set[str]]]
) -> None:
    loaded = after[folder]["loaded"]
    assert f"torch_ps.{folder}" in loaded
    hidden = {f"torch_ps.{each}" for each in set(MAY_IMPORT) - MAY_IMPORT[folder]}
    assert {name for name in loaded if within(name, hidden)} == set()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_loaded_modules_hold_nothing_that_unpickles(folder: str, after: dict[str, dict[str, set[str]]]) -> None:
    assert after[folder]["holders"] == set()


def test_importing_torch_ps_is_cheap(after: dict[str, dict[str, set[str]]]) -> None:
    loaded = after["torch_ps"]["loaded"]
    assert loaded & {"torch", "grpc", "numpy", "torch_ps.ps", "torch_ps.worker"} == set()


def test_the_public_names_do_not_load_the_server(after: dict[str, dict[str, set[str]]]) -> None:
    loaded = after["worker"]["loaded"]
    assert {name for name in loaded if within(name, {"torch_ps.ps", "torch_ps.compare"})} == set()


def test_planted_import_and_pickle_at_run_time_are_seen() -> None:
    plant = "import torch_ps.common.errors as module\nimport importlib\n"
    seen = probe(
        "__import__('json.tool')",
        plant + "module.p = importlib.import_module('pickle')",
        plant + "class load: pass\nload.__module__ = 'torch.serialization'\nmodule.load = load",
    )
    assert "json.tool" in seen[0]["loaded"]
    assert seen[1]["holders"] == {"torch_ps.common.errors.p"}
    assert seen[2]["holders"] == {"torch_ps.common.errors.load"}
