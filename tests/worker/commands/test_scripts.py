"""A script of the user's under ps-worker: it runs as under Python, and its errors are its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def ps_worker(script: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``script``; it needs no server unless it asks for one."""
    (cwd / "folder").mkdir(exist_ok=True)
    (cwd / "folder" / "train.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-m", "torch_ps.worker.commands.worker", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    script = (
        "import sys, os, beside\n"
        "print(__name__, __file__, sys.argv, sys.path[0] == os.path.dirname(os.path.abspath(__file__)))\n"
        "print('torch' in sys.modules, sys.modules['__main__'].__dict__ is globals(), beside.__file__)\n"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").touch()
    result = ps_worker(script, "folder/train.py", "--lr", "1", cwd=tmp_path)
    first, second = result.stdout.splitlines() or [result.stderr, ""]
    assert first == "__main__ folder/train.py ['folder/train.py', '--lr', '1'] True"
    assert second == f"False True {tmp_path}/folder/beside.py"


def test_options_reach_a_script_as_variables(tmp_path: Path) -> None:
    script = "import os\nprint(*(os.environ.get(n) for n in ('PS_SERVERS', 'PS_COMPRESS', 'PS_SEED', 'RANK')))"
    result = ps_worker(
        script,
        "--servers=h:1",
        "--compress=fp16",
        "--rank=2",
        "folder/train.py",
        cwd=tmp_path,
        PS_COMPRESS="bf16",
        PS_SEED="7",
    )
    assert result.stdout == "h:1 fp16 7 2\n", result.stderr


def test_the_traceback_of_a_script_is_its_own(tmp_path: Path) -> None:
    result = ps_worker("def f(): return 1 / 0\nf()\n", "folder/train.py", cwd=tmp_path)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert 'File "folder/train.py", line 2, in <module>' in lines[1]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "cli.py" not in result.stderr


def test_a_script_that_is_no_python_says_where(tmp_path: Path) -> None:
    result = ps_worker("x = = 1\n", "folder/train.py", cwd=tmp_path)
    assert result.returncode == 1
    assert 'File "folder/train.py", line 1' in result.stderr
    assert result.stderr.splitlines()[-1] == "SyntaxError: invalid syntax"


def test_an_error_of_ours_in_a_script_is_one_sentence(tmp_path: Path) -> None:
    result = ps_worker(
        "import torch_ps\nraise torch_ps.ConfigError('no such thing')\n", "folder/train.py", cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (1, "Error: no such thing\n")


def test_the_exit_code_of_a_script_is_that_of_the_command(tmp_path: Path) -> None:
    assert ps_worker("raise SystemExit(7)", "folder/train.py", cwd=tmp_path).returncode == 7


def test_ctrl_c_lets_a_script_clean_up(tmp_path: Path) -> None:
    script = f"import os\ntry: os.kill(os.getpid(), {int(signal.SIGINT)})\nfinally: print('cleaned up')\n"
    result = ps_worker(script, "folder/train.py", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "cleaned up\n", "")


def test_sigterm_lets_a_script_clean_up(tmp_path: Path) -> None:
    script = f"import os\ntry: os.kill(os.getpid(), {int(signal.SIGTERM)})\nfinally: print('cleaned up')\n"
    result = ps_worker(script, "folder/train.py", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (143, "cleaned up\n", "")
