"""No codec warns, which only a fresh interpreter shows: torch warns once per process."""

import subprocess
import sys


def test_decoding_is_quiet_even_where_warnings_are_errors() -> None:
    program = (
        "import warnings, torch\nfrom torch_ps.common import codecs\nwarnings.simplefilter('error')\n"
        "codecs.codec('none').decode(memoryview(bytes(8)), torch.empty(2))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
