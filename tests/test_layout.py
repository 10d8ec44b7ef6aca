"""The code keeps the rules of ``tests/support/layout.py``, and each rule is able to fail."""

from pathlib import Path

import pytest

from tests.support.layout import (
    GRPC_ROOMS,
    MAY_IMPORT,
    ORDER,
    PUBLIC,
    READERS,
    ROOT,
    SAME_AT_BOTH,
    WHOLE_SYSTEM,
    borrowed,
    broken,
    circles,
    dotted,
    grpc_imports,
    imports,
    impure,
    not_below,
    parsed,
    sources,
    unsafe,
    wrong_folder,
)

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


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_package_holds_a_link_to_each_folder(folder: str) -> None:
    assert (ROOT / "torch_ps" / folder).readlink() == Path("..") / folder


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
