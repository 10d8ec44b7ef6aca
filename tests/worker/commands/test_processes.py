"""Children, their lines and their end. They are small Python programs without torch."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ended
from torch_ps.worker.commands import processes
from torch_ps.worker.commands.processes import Child, Processes

OUT_OF_MEMORY = " (as the system does to a process where memory runs out)"
HOLD = "from torch_ps.common import parent_death; parent_death.hold(); import time, signal\n"


class Streams:
    """Where the children's output goes in these tests."""

    def __init__(self) -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()

    def lines(self) -> list[str]:
        return self.out.getvalue().decode().splitlines()


def start(children: Processes, name: str, program: str) -> Child:
    return children.start(name, [sys.executable, "-c", program], os.environ)


def wait_for_end(children: Processes, *awaited: Child) -> None:
    left = set(awaited)
    while left:
        left -= set(children.poll(0.05))


def wait_for_line(children: Processes, streams: Streams, text: str) -> None:
    while not any(text in line for line in streams.lines()):
        assert not children.poll(0.05)


def wait_for_death(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process, which need not be a child of ours, is gone by then."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return ended(handle, seconds)
    finally:
        os.close(handle)


def test_lines_carry_the_name_and_stay_on_their_stream() -> None:
    streams = Streams()
    with Processes(streams.out, streams.err) as children:
        child = start(children, "w0", "import sys; print('one'); print('two', file=sys.stderr); print('end', end='')")
        wait_for_end(children, child)
    assert streams.lines() == ["w0 | one", "w0 | end"]
    assert streams.err.getvalue() == b"w0 | two\n"
    assert child.exit_code == 0


def test_lines_of_several_children_are_never_mixed() -> None:
    streams = Streams()
    with Processes(streams.out, streams.err) as children:
        program = "import sys\nfor n in range(300): sys.stdout.write('abc' * 50); sys.stdout.write('\\n')"
        wait_for_end(children, *(start(children, name, program) for name in ("a", "b")))
    assert sorted(streams.lines()) == ["a | " + "abc" * 50] * 300 + ["b | " + "abc" * 50] * 300


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LONGEST_LINE", 1000)
    streams = Streams()
    with Processes(streams.out, streams.err) as children:
        wait_for_end(children, start(children, "w0", "print('x' * 5000, end='')"))
    assert sum(line.count("x") for line in streams.lines()) == 5000
    assert len(streams.lines()) > 1


def test_the_end_of_a_child_is_told_in_words() -> None:
    streams = Streams()
    with Processes(streams.out, streams.err) as children:
        failed = start(children, "w0", "import sys; sys.exit('no such thing')")
        killed = start(children, "w1", "import os; os.kill(os.getpid(), 9)")
        wait_for_end(children, failed, killed)
    assert (failed.ending, failed.exit_code) == ("w0 ended with exit code 1", 1)
    assert (killed.ending, killed.exit_code) == (f"w1 was killed by SIGKILL{OUT_OF_MEMORY}", 137)
    assert list(failed.last_lines) == ["no such thing"]


def test_leaving_the_block_ends_the_children() -> None:
    streams = Streams()
    with Processes(streams.out, streams.err) as children:
        child = start(children, "w0", "import time; print('here', flush=True); time.sleep(100)")
        wait_for_line(children, streams, "here")
        assert child.ending == "w0 is still running"
    assert child.ending == "w0 was killed by SIGTERM"


def test_a_child_that_will_not_end_is_ended_and_so_is_its_own_child() -> None:
    streams = Streams()
    stubborn = "signal.signal(15, signal.SIG_IGN); print('pid', os.getpid(), flush=True); time.sleep(100)"
    imports = "import os, signal, subprocess, sys, time\n"
    program = f"{imports}subprocess.Popen([sys.executable, '-c', {imports + stubborn!r}])\n{stubborn}"
    with Processes(streams.out, streams.err) as children:
        child = start(children, "w0", program)
        while len(streams.lines()) < 2:
            children.poll(0.05)
        children.stop([child], grace=0.1)
        assert child.ending == "w0 did not end within 0.1 s and was killed"
    pids = [int(line.split()[-1]) for line in streams.lines()]
    assert len(set(pids)) == 2
    assert all(wait_for_death(pid) for pid in pids)


def test_what_a_child_leaves_behind_ends_with_it() -> None:
    streams = Streams()
    grandchild = "import time; time.sleep(100)"
    program = f"import subprocess, sys; print('pid', subprocess.Popen([sys.executable, '-c', {grandchild!r}]).pid)"
    with Processes(streams.out, streams.err) as children:
        wait_for_end(children, start(children, "w0", program))
        assert wait_for_death(int(streams.lines()[0].split()[-1]))


def test_children_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    child = HOLD + "import os; print('pid', os.getpid(), flush=True); time.sleep(100)"
    parent = (
        "import os, sys\nfrom torch_ps.worker.commands.processes import Processes\n"
        f"with Processes() as children:\n    children.start('w0', [sys.executable, '-c', {child!r}], os.environ)\n"
        "    while True: children.poll(1)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[-1])
        process.send_signal(signal.SIGKILL)
        assert wait_for_death(pid)


def test_a_log_on_a_full_disk_ends_no_job(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "wb", buffering=0) as full, Processes(full, io.BytesIO()) as children:
        child = start(children, "w0", "for n in range(3): print('line', flush=True)")
        wait_for_end(children, child)
        assert child.exit_code == 0
    assert children.lost == "No space left on device"
    assert caplog.messages == ["lines of w0 are lost, and the job goes on: No space left on device"]
