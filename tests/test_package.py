"""What an installed torch-ps consists of: the package ``torch_ps`` alone, with every module and every data file."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "ps", "worker", "compare")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths inside a wheel of this tree, made from a copy because setuptools leaves its traces beside the source."""
    tree = tmp_path_factory.mktemp("tree") / "torch-ps"
    tree.mkdir()
    for name in (*FOLDERS, "torch_ps"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (built,) = (tree / "dist").glob("torch_ps-*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_one_package(wheel: list[str]) -> None:
    assert {path.split("/")[0].split("-")[0] for path in wheel} == {"torch_ps"}


def test_wheel_holds_every_file_of_the_folders(wheel: list[str]) -> None:
    ours = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {f"torch_ps/{path.relative_to(ROOT)}" for path in ours if "__pycache__" not in path.parts}
    assert wanted | {"torch_ps/py.typed"} <= set(wheel)


def test_every_command_names_a_function_that_exists() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(commands) == ["ps-compare", "ps-export", "ps-run", "ps-serve", "ps-status", "ps-worker"]
    for entry in commands.values():
        module, function = entry.split(":")
        program = f"import {module} as m; assert callable(m.{function})"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
