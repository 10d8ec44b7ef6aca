"""The shape of the code, as tests: the order of the rooms, what the core may touch, where gRPC may be.

A *room* is a sub-package of ``ps``, ``worker`` or ``common``, or a file at the top of one. Each rule is a function from
the text of a file to what is wrong with it, so that a planted violation can show that the rule is able to fail. Imports
made at run time are caught by loading the code in a fresh interpreter.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.field_ranges import RANGES

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "ps": {"common", "ps"},
    "worker": {"common", "worker"},
    "compare": {"common", "compare"},
}
#: From top to bottom. A room imports rooms of the lines below its own; two rooms of one line do not know each other.
ORDER = {
    "ps": (
        {"server"},
        {"failover"},
        {"checkpoint", "cluster"},
        {"job"},
        {"engine"},
        {"transport"},
        {"observability"},
        {"core"},
    ),
    "worker": (
        {"commands"},
        {"training"},
        {"client", "data"},
        {"leased_data"},
        {"optim"},
        {"session"},
        {"transport"},
        {"gradients", "runtime", "tasks"},
    ),
    "common": (
        {"options", "rpc"},
        {"arena", "codecs", "security"},
        {"plan", "trace"},
        {"schema"},
        {"daemon_thread", "devices", "optimizer_spec", "version", "wire"},
        {
            "allocator",
            "ending_signals",
            "errors",
            "host_id",
            "log",
            "memory_limit",
            "parent_death",
            "private_pages",
            "pb",
            "slow_start",
            "standard_streams",
            "tensor_words",
            "typed_numbers",
        },
    ),
}
#: Rooms that may speak gRPC.
GRPC_ROOMS = {
    "common": {"rpc"},
    "ps": {"cluster", "server", "transport"},
    "worker": {"transport"},
    "compare": set[str](),
}
#: Files that may lie at the top of a folder: what users import, and in ``common`` and ``compare`` single ideas.
PUBLIC = {"ps": {"__init__"}, "worker": {"__init__", "client", "data", "leased_data"}}
#: Two files may have one name where they do the same, at both ends or for two programs.
SAME_AT_BOTH = {"__init__", "cli", "registry", "responses", "shared_memory", "status"}
#: Kinds of tests that are of the whole system, or of what is no room.
WHOLE_SYSTEM = {
    "bench",
    "chaos",
    "compare",
    "conformance",
    "deploy",
    "docs",
    "fuzz",
    "hostile",
    "integrations",
    "loops",
    "sim",
    "soak",
    "support",
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
    "torch_ps.common.options.mode_choices",
    "torch_ps.common.wire.terms",
    "torch_ps.ps.core",
)
#: Methods that make a message of bytes.
PARSING = {"FromString", "ParseFromString", "MergeFromString"}
#: Files of a server that read the bytes of peers: the boundary, and a standby what its primary sends.
READERS = ("ps/transport/boundary.py", "ps/failover/standby.py")
PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def sources(*folders: str) -> list[Path]:
    """Every Python file of these folders that people write."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not {"pb", "data"} & set(path.relative_to(ROOT).parts)]


def dotted(path: Path) -> str:
    return ".".join(("torch_ps", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


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


# ------------------------------------------------------------------ rules


def wrong_folder(folder: str, source: str) -> set[str]:
    """Imports of a folder that ``folder`` may not see, of the public API, or by a folder's bare name."""
    own = {name for name in imports(source) if within(name, {"torch_ps", *MAY_IMPORT}) or name.startswith(".")}
    return {name for name in own if not within(name, {f"torch_ps.{each}" for each in MAY_IMPORT[folder]})}


def not_below(module: str, source: str) -> set[str]:
    """Imports of ``module`` from rooms of its own folder that are not below its own."""
    _, folder, *rest = module.split(".")
    if folder not in ORDER or not rest:
        return set()
    level = {room: number for number, rooms in enumerate(ORDER[folder]) for room in rooms}
    found = set()
    for name in imports(source):
        _, *parts = name.split(".")
        if (
            parts[:1] == [folder]
            and len(parts) > 1
            and parts[1] != rest[0]
            and level.get(parts[1], -1) <= level[rest[0]]
        ):
            found.add(name)
    return found


def circles(graph: Mapping[str, set[str]]) -> set[str]:
    """Modules that import each other, directly or through others, as ``a > b > a``; one for each circle that is met."""
    found: set[str] = set()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.add(" > ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for each in sorted(graph.get(module, ())):
                visit(each, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def impure(source: str) -> set[str]:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return {name for name in imports(source) if not within(name, PURE)} | calls & {
        "open",
        "print",
        "input",
        "__import__",
    }


def grpc_imports(source: str) -> set[str]:
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


def parsed(source: str) -> set[str]:
    """Ways to read the bytes of a peer."""
    calls = {node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    found = {ast.unparse(f) for f in calls if isinstance(f, ast.Attribute) and f.attr in PARSING}
    readers = {"torch_ps.common.wire.frames.unpack", "torch_ps.common.wire.frames.unpack_all"}
    return found | (imports(source) & readers)


def borrowed(source: str) -> set[str]:
    """Attributes that a class declares and never sets: those of another class, of which it is a torn-off part."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.decorator_list:  # a dataclass sets what it declares
            continue
        if any(ast.unparse(base).split("[")[0].rpartition(".")[2] in SHAPES for base in node.bases):
            continue
        declared = {
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and each.value is None and isinstance(each.target, ast.Name)
        }
        assigned = {
            each.attr
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
        }
        found |= {f"{node.name}.{name}" for name in declared - assigned}
    return found


#: Bases of classes whose annotations are their meaning.
SHAPES = {"Protocol", "NamedTuple", "TypedDict", "Structure"}


def broken(rule: Callable[[str], set[str]], paths: list[Path]) -> str:
    """One line for each file that breaks a rule."""
    found = {path.relative_to(ROOT): sorted(rule(path.read_text(encoding="utf-8"))) for path in paths}
    return "\n".join(f"{path}: {', '.join(wrong)}" for path, wrong in found.items() if wrong)


# ------------------------------------------------------------------ the code keeps them


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_it_may(folder: str) -> None:
    assert broken(lambda source: wrong_folder(folder, source), sources(folder)) == ""


@pytest.mark.parametrize("folder", sorted(ORDER))
def test_upper_room_imports_lower_ones_only(folder: str) -> None:
    found = {
        f"{dotted(path)}: {name}"
        for path in sources(folder)
        for name in not_below(dotted(path), path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize("folder", sorted(ORDER))
def test_every_room_has_its_place_in_the_order(folder: str) -> None:
    rooms = {path.relative_to(ROOT / folder).parts[0].removesuffix(".py") for path in sources(folder)}
    placed = [room for rooms_of_a_line in ORDER[folder] for room in rooms_of_a_line]
    assert sorted(placed) == sorted((rooms - {"__init__"}) | ({"pb"} if folder == "common" else set()))


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {dotted(path): path for path in sources(*MAY_IMPORT)}
    graph = {}
    for module, path in modules.items():
        names = imports(path.read_text(encoding="utf-8"))
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & set(modules)) - {module}
    assert circles(graph) == set()


@pytest.mark.parametrize("folder", sorted(PUBLIC))
def test_top_of_a_folder_holds_public_modules_only(folder: str) -> None:
    assert {path.stem for path in (ROOT / folder).glob("*.py")} <= PUBLIC[folder]


def test_no_two_files_have_one_name_but_for_the_same_at_both_ends() -> None:
    names = [path.stem for path in sources(*MAY_IMPORT)]
    assert {name for name in names if names.count(name) > 1} <= SAME_AT_BOTH


def test_tests_lie_in_the_rooms_that_they_are_of() -> None:
    rooms = {path.name for path in (ROOT / "ps").iterdir() if path.is_dir()} | {"common", "worker"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= rooms | WHOLE_SYSTEM
    for top in ("common", "worker"):
        inner = {path.name for path in (ROOT / top).iterdir() if path.is_dir()}
        found = {path.name for path in (ROOT / "tests" / top).iterdir() if path.is_dir()} - {"__pycache__"}
        assert found <= inner


def test_core_imports_nothing_that_could_do_io_or_tell_the_time() -> None:
    assert broken(impure, sources("ps/core")) == ""


def test_grpc_is_imported_in_its_rooms_only() -> None:
    elsewhere = [
        path
        for folder in MAY_IMPORT
        for path in sources(folder)
        if path.relative_to(ROOT / folder).parts[0] not in GRPC_ROOMS[folder]
    ]
    assert broken(grpc_imports, elsewhere) == ""


def test_nothing_unpickles_or_evaluates() -> None:
    assert broken(unsafe, sources(*MAY_IMPORT, "torch_ps")) == ""


def test_servers_read_the_bytes_of_peers_at_the_boundary_only() -> None:
    assert broken(parsed, [path for path in sources("ps") if str(path.relative_to(ROOT)) not in READERS]) == ""


def test_no_class_is_a_part_of_another_one() -> None:
    assert broken(borrowed, sources(*MAY_IMPORT)) == ""


# ------------------------------------------------------------------ the contract

#: Messages that are frames, cut by ``frames.py``, and the header of each.
HEADERS: dict[str, Any] = {"UpFrame": pb.UpHeader, "SeedFrame": pb.SeedHeader}


def inside(descriptor: Descriptor) -> Iterator[Descriptor]:
    """A message and all that can be in it."""
    if not descriptor.GetOptions().map_entry:
        yield descriptor
    for field in descriptor.fields:
        if field.message_type is not None:
            yield from inside(field.message_type)


def arriving() -> dict[str, Descriptor]:
    """Every message that a server takes, by the contract."""
    methods = pb.DESCRIPTOR.services_by_name["ParameterServer"].methods
    inputs = [HEADERS[m.input_type.name].DESCRIPTOR if m.input_type.name in HEADERS else m.input_type for m in methods]
    return {each.name: each for descriptor in inputs for each in inside(descriptor)}


def test_every_field_that_can_arrive_has_a_range() -> None:
    """A new field has to be thought about: what happens at its largest value, at its longest text?"""
    assert {name: set(ranges) for name, ranges in RANGES.items()} == {
        name: {field.name for field in descriptor.fields} for name, descriptor in arriving().items()
    }


# ------------------------------------------------------------------ the rules are able to fail


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
        ("compare", "from torch_ps.worker.commands.run import main", "torch_ps.worker.commands.run.main"),
    ],
)
def test_planted_import_across_folders_is_seen(folder: str, line: str, seen: str) -> None:
    assert wrong_folder(folder, line) == {seen}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torch_ps.ps.core.shard", "from torch_ps.ps.engine import lanes"),
        ("torch_ps.ps.job.job", "def late() -> None:\n    from torch_ps.ps.failover.etcd import clock"),
        ("torch_ps.ps.cluster.describe", "import torch_ps.ps.checkpoint.repository"),
        ("torch_ps.ps.transport.streams", "from typing import TYPE_CHECKING\nimport torch_ps.ps.server.servicer"),
        ("torch_ps.worker.runtime.access", "from torch_ps.worker.gradients import gradients"),
        ("torch_ps.worker.optim.optimizer", "from torch_ps.worker.client import Client"),
        ("torch_ps.common.wire.frames", "from torch_ps.common import schema"),
        ("torch_ps.ps.engine.lanes", "from torch_ps.ps import job"),
    ],
)
def test_planted_import_of_an_upper_room_is_seen(module: str, line: str) -> None:
    assert not_below(module, line)


def test_import_of_a_lower_room_is_no_violation() -> None:
    assert not_below("torch_ps.ps.job.job", "from torch_ps.ps.core.effects import Wait") == set()
    assert not_below("torch_ps.ps.job.job", "from torch_ps.ps.job.status import reply") == set()


def test_planted_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a > b > c > a"}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "def f() -> None:\n    import random",
        "from torch_ps.common.wire import status",
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
    assert grpc_imports(line)


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


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("from torch_ps.common.wire.frames import unpack", "torch_ps.common.wire.frames.unpack"),
        ("pb.Hello.FromString(data)", "pb.Hello.FromString"),
        ("message.ParseFromString(data)", "message.ParseFromString"),
    ],
)
def test_planted_reading_elsewhere_is_seen(line: str, seen: str) -> None:
    assert parsed(line) == {seen}
    assert parsed("call(method, None, pb.Hello.FromString)") == set()


def test_planted_part_of_another_class_is_seen() -> None:
    assert borrowed("class Part:\n    whole: int\n    def f(self): return self.whole") == {"Part.whole"}
    assert borrowed("class Whole:\n    whole: int\n    def __init__(self): self.whole = 1") == set()
    assert borrowed("class Shape(Protocol):\n    whole: int") == set()


# ------------------------------------------------------------------ what is loaded at run time

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
    """What each folder, the core and the public API load, each in an interpreter of its own."""
    codes = {folder: load_all(folder) for folder in (*MAY_IMPORT, "ps/core")}
    codes["torch_ps"] = "import torch_ps"
    codes["public names"] = "import torch_ps\nfor name in torch_ps.__all__: getattr(torch_ps, name)"
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
    loaded = after["public names"]["loaded"]
    assert "torch_ps.worker" in loaded
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


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_package_holds_a_link_to_each_folder(folder: str) -> None:
    assert (ROOT / "torch_ps" / folder).readlink() == Path("..") / folder
