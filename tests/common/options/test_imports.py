"""What a program loads that only declares options, in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def test_declaring_options_does_not_import_click() -> None:
    program = "import sys, torch_ps.common.options.server_config; sys.exit('click' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3], env=os.environ).returncode == 0
    )
