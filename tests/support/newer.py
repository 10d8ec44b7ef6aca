"""ps-serve as a process of a newer wire number, as after half an upgrade."""

from torch_ps.common import version
from torch_ps.ps.server import cli


def serve(arguments: list[str]) -> None:
    """Run ps-serve with a wire number that is 2 above this one."""
    version.WIRE += 2
    cli.main(arguments)
