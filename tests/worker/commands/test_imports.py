"""What the commands load before they look at their options."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["status", "run"])
def test_command_that_trains_nothing_loads_no_torch(command: str) -> None:
    """Torch takes seconds to load, which a misspelt option would have to wait for."""
    program = f"import sys, torch_ps.worker.commands.{command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
