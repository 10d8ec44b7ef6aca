"""The shape of the code, as tests: who may import whom, what the core may touch, how long a file may get.

Each rule is a function from the text of a file to what is wrong with it, so that a planted violation can show that the
rule is able to fail. Imports made at run time are caught by loading the code in a fresh interpreter.
"""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "ps": {"common", "ps"},
    "worker": {"common", "worker"},
    "compare": {"common", "compare"},
}
#: All that the core may import; what is not here could be a clock, a socket, a thread or a tensor.
PURE = (
    "__future__",
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "typing",
    "torch_ps.common.errors",
    "torch_ps.common.wire.terms",
    "torch_ps.ps.core",
)
#: Modules that speak gRPC.
WIRE = (
    "common/wire/status.py",
    "common/wire/channel.py",
    "common/security/credentials.py",
    "ps/cluster/describe.py",
    "ps/transport/auth.py",
    "ps/cluster/registration.py",
    "ps/cluster/lead_client.py",
    "ps/transport/error_mapping.py",
    "ps/server/server.py",
    "ps/failover/fencing.py",
    "ps/server/servicer.py",
    "ps/failover/standby.py",
    "worker/transport/grpc_stream.py",
    "worker/transport/link.py",
)
PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    """Every Python file of these folders that people write."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "pb" not in path.parts and "data" not in path.parts]


def imports(source: str) -> set[str]:
    """Dotted names that a file imports, wherever in it: ``from a import b`` counts as ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong_folder(folder: str, source: str) -> set[str]:
    """Imports of a folder that ``folder`` may not see, of the public API, or by a folder's bare name."""
    own = {name for name in imports(source) if within(name, {"torch_ps", *MAY_IMPORT}) or name.startswith(".")}
    return {name for name in own if not within(name, {f"torch_ps.{each}" for each in MAY_IMPORT[folder]})}


def impure(source: str) -> set[str]:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return {name for name in imports(source) if not within(name, PURE)} | calls & {
        "open",
        "print",
        "input",
        "__import__",
    }


def wire(source: str) -> set[str]:
    return {name for name in imports(source) if within(name, {"grpc", "grpc_health"})}


def unsafe(source: str) -> set[str]:
    """Ways to run what came in as data."""
    found = {name for name in imports(source) if within(name, PICKLES) or name in ("torch.load", "torch.package")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load"):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.add("allow_pickle")
    return found


def too_long(source: str) -> set[str]:
    lines = source.count("\n")
    return {f"{lines} lines"} if lines > MAX_LINES else set()


def broken(rule: Callable[[str], set[str]], paths: list[Path]) -> str:
    """One line for each file that breaks a rule."""
    found = {path.relative_to(ROOT): sorted(rule(path.read_text(encoding="utf-8"))) for path in paths}
    return "\n".join(f"{path}: {', '.join(wrong)}" for path, wrong in found.items() if wrong)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_it_may(folder: str) -> None:
    assert broken(lambda source: wrong_folder(folder, source), sources(folder)) == ""


def test_core_imports_nothing_that_could_do_io_or_tell_the_time() -> None:
    assert broken(impure, sources("ps/core")) == ""


def test_grpc_is_imported_by_the_wire_modules_only() -> None:
    elsewhere = [path for path in sources(*MAY_IMPORT) if str(path.relative_to(ROOT)) not in WIRE]
    assert broken(wire, elsewhere) == ""


def test_nothing_unpickles_or_evaluates() -> None:
    assert broken(unsafe, sources(*MAY_IMPORT, "torch_ps")) == ""


def test_no_file_is_longer_than_400_lines() -> None:
    assert broken(too_long, sources(*MAY_IMPORT, "tests", "bench", "examples")) == ""


@pytest.mark.parametrize(
    ("folder", "line", "seen"),
    [
        ("common", "from torch_ps.ps import store", "torch_ps.ps.store"),
        ("common", "import torch_ps.worker.client", "torch_ps.worker.client"),
        ("ps", "def late() -> None:\n    from torch_ps import worker", "torch_ps.worker"),
        ("ps", "import worker", "worker"),
        ("ps", "from torch_ps import Client", "torch_ps.Client"),
        ("worker", "if True:\n    import torch_ps.ps.core as core", "torch_ps.ps.core"),
        ("worker", "from ..ps import core", "..ps.core"),
        ("compare", "from torch_ps.worker.commands.launch import main", "torch_ps.worker.commands.launch.main"),
    ],
)
def test_planted_import_across_folders_is_seen(folder: str, line: str, seen: str) -> None:
    assert wrong_folder(folder, line) == {seen}


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "def f() -> None:\n    import random",
        "from torch_ps.common import status",
        "import torch",
        "import os",
        "from threading import Lock",
        "print(1)",
    ],
)
def test_planted_impurity_in_the_core_is_seen(line: str) -> None:
    assert impure(line)


@pytest.mark.parametrize("line", ["import grpc", "from grpc import aio", "import grpc_health.v1.health_pb2"])
def test_planted_grpc_is_seen(line: str) -> None:
    assert wire(line)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "x = torch.load(path, weights_only=True)",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_planted_unpickling_is_seen(line: str) -> None:
    assert unsafe(line)


def test_planted_long_file_is_seen() -> None:
    assert too_long("\n" * (MAX_LINES + 1))
    assert not too_long("\n" * MAX_LINES)


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after ``code``."""
    program = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())


def load_all(folder: str) -> str:
    """Code that imports every module of a folder."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in sources(folder))
    names = [".".join(("torch_ps", *path.parts)).removesuffix(".__init__") for path in paths]
    return "\n".join(f"import {name}" for name in names if not name.endswith(".__main__"))


def test_loading_the_core_loads_nothing_impure() -> None:
    loaded = loaded_after(load_all("ps/core"))
    assert "torch_ps.ps.core" in loaded
    assert loaded & {"grpc", "torch", "numpy", "asyncio", "threading", "random", "socket"} == set()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_loading_a_folder_loads_no_folder_that_it_may_not_see(folder: str) -> None:
    loaded = loaded_after(load_all(folder))
    assert f"torch_ps.{folder}" in loaded
    hidden = {f"torch_ps.{each}" for each in set(MAY_IMPORT) - MAY_IMPORT[folder]}
    assert {name for name in loaded if within(name, hidden)} == set()


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_loaded_modules_hold_nothing_that_unpickles(folder: str) -> None:
    assert holders(load_all(folder)) == set()


def test_planted_pickle_in_a_loaded_module_is_seen() -> None:
    plant = "import torch_ps.common.errors as module\nimport importlib\n"
    assert holders(plant + "module.p = importlib.import_module('pickle')") == {"torch_ps.common.errors.p"}
    assert holders(plant + "import torch\nmodule.load = torch.load") == {"torch_ps.common.errors.load"}


def holders(code: str) -> set[str]:
    """Names in our modules, once ``code`` has run, that are a module or a function which unpickles."""
    program = f"""
import sys
{code}
unsafe = {sorted(PICKLES)!r}
for name, module in list(sys.modules.items()):
    if name.startswith("torch_ps"):
        for key, value in vars(module).items():
            home = getattr(value, "__name__", "") if isinstance(value, type(sys)) else getattr(value, "__module__", "")
            what = (home, getattr(value, "__name__", ""))
            if str(home).partition(".")[0] in unsafe or what == ("torch.serialization", "load"):
                print(f"{{name}}.{{key}}")
"""
    return set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())


def test_importing_torch_ps_is_cheap() -> None:
    loaded = loaded_after("import torch_ps")
    assert loaded & {"torch", "grpc", "numpy", "torch_ps.ps", "torch_ps.worker"} == set()


def test_the_public_names_do_not_load_the_server() -> None:
    loaded = loaded_after("import torch_ps\nfor name in torch_ps.__all__: getattr(torch_ps, name)")
    assert "torch_ps.worker" in loaded
    assert {name for name in loaded if within(name, {"torch_ps.ps", "torch_ps.compare"})} == set()


def test_planted_import_at_run_time_is_seen() -> None:
    assert "json.decoder" in loaded_after("__import__('json')")


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_package_holds_a_link_to_each_folder(folder: str) -> None:
    assert (ROOT / "torch_ps" / folder).readlink() == Path("..") / folder
