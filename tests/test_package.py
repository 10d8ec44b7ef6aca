"""What is published: the package ``torch_ps`` alone, which runs by itself, and files around it that have to agree."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import torch_ps

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "ps", "worker", "compare")


FORMS = ("links", "texts", "absent")


def tree(form: str, place: Path) -> Path:
    """A copy of the files that the image of deploy/docker is made of, so that one has all that it needs too.

    A copy, because setuptools leaves its traces beside the source.

    Args:
        form: what torch_ps/{common,ps,worker,compare} are: symbolic links, as git has them; text files with the
            target, as in a zip or where core.symlinks is false; or absent, as in an sdist.
        place: an empty folder.
    """
    copied = place / "torch-ps"
    copied.mkdir()
    let_in = (ROOT / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    for name in [*(line[1:] for line in let_in if line.startswith("!")), "MANIFEST.in", "CHANGELOG.md"]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copied)
    for folder in FOLDERS if form != "links" else ():
        link = copied / "torch_ps" / folder
        target = link.readlink()
        link.unlink()
        if form == "texts":
            link.write_text(str(target), encoding="utf-8")
    return copied


def build(*arguments: str, cwd: Path) -> Path:
    """The folder with what was built there."""
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments]
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    return cwd / "dist"


def contents(folder: Path) -> dict[str, bytes]:
    """Path and bytes of each file in the only wheel there."""
    (built,) = folder.glob("torch_ps-*.whl")
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and a wheel made from it."""
    return build(cwd=tree("links", tmp_path_factory.mktemp("tree")))


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    return contents(dist)


@pytest.mark.parametrize("form", FORMS)
def test_wheel_of_a_tree_with_or_without_links_is_that_of_the_sdist(
    form: str, wheel: dict[str, bytes], tmp_path: Path
) -> None:
    built = contents(build("--wheel", cwd=tree(form, tmp_path)))
    assert sorted(built) == sorted(wheel)
    assert [path for path in wheel if built[path] != wheel[path]] == []


@pytest.mark.parametrize("form", FORMS)
def test_editable_install_finds_every_folder(form: str, tmp_path: Path) -> None:
    copied, site = tree(form, tmp_path), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), "--editable", str(copied)], check=True, capture_output=True)
    program = f"""if True:
        import importlib.util, site
        site.addsitedir({str(site)!r})
        for folder in {FOLDERS}:
            print(importlib.util.find_spec(f"torch_ps.{{folder}}").origin)
        import torch_ps.ps.core.shard
    """
    # Without the site-packages of this environment, whose own editable install would come first.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    found = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert found == [copied.resolve() / folder / "__init__.py" for folder in FOLDERS]


def test_wheel_holds_one_package(wheel: dict[str, bytes]) -> None:
    assert {path.split("/")[0].split("-")[0] for path in wheel} == {"torch_ps"}


def test_wheel_holds_every_file_of_the_folders(wheel: dict[str, bytes]) -> None:
    ours = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {f"torch_ps/{path.relative_to(ROOT)}" for path in ours if "__pycache__" not in path.parts}
    assert wanted | {"torch_ps/py.typed"} <= set(wheel)


def test_every_command_names_a_function_that_exists() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(commands) == ["ps-compare", "ps-export", "ps-run", "ps-serve", "ps-status", "ps-worker"]
    for entry in commands.values():
        module, function = entry.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_sdist_holds_what_the_wheel_does_and_no_test(dist: Path, wheel: dict[str, bytes]) -> None:
    (packed,) = dist.glob("torch_ps-*.tar.gz")
    with tarfile.open(packed) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    own = {path for path in wheel if path.startswith("torch_ps/")}
    assert {
        path if (ROOT / path).parent == ROOT / "torch_ps" else path.removeprefix("torch_ps/") for path in own
    } <= held
    assert {"CHANGELOG.md", "LICENSE", "README.md"} <= held
    assert not any(path.startswith("tests") for path in held)


def test_wheel_alone_runs_a_whole_job(dist: Path, tmp_path: Path) -> None:
    (built,) = dist.glob("torch_ps-*.whl")
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-deps",
        "--no-index",
        "--target",
        str(installed),
        str(built),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    done = subprocess.run(
        [str(installed / "bin/ps-run"), "-n", "2", "--task", "digits", "--samples", "12800", "--lr", "0.4"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert 100 * float(done.stderr.split("accuracy ")[1].split()[0]) > 90
    assert not list(empty.iterdir())


def test_import_loads_nothing_but_itself() -> None:
    program = """if True:
        import sys, torch
        before = set(sys.modules)
        import torch_ps
        print(*sorted({name for name in set(sys.modules) - before}))
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["torch_ps"]


def test_versions_agree_and_are_semantic() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == torch_ps.__version__
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version)


def test_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[[0-9]+\.[0-9]+\.[0-9]+\] - [0-9]{4}-[0-9]{2}-[0-9]{2}", each) for each in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds


def test_every_supported_python_is_named_and_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.[0-9]+$", line)]
    assert named == ["3.11", "3.12", "3.13"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"


def test_workflows_are_valid_and_call_targets_that_exist() -> None:
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        done = subprocess.run([*check, schema, *map(str, files)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    called = {target for file in files for target in re.findall(r"run: make ([a-z]+)", file.read_text())}
    assert called == {"test", "dist"}
    assert called <= targets


def test_issue_templates_are_forms() -> None:
    files = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    schemas = {file: "config" if file.stem == "config" else "forms" for file in files}
    assert len(files) == 4
    for file, schema in schemas.items():
        check = [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            f"vendor.github-issue-{schema}",
            str(file),
        ]
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
