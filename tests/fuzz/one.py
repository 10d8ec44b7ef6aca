"""One target under atheris: python -m tests.fuzz.one TARGET [options of libFuzzer] CORPUS..."""

import sys

import atheris

with atheris.instrument_imports(
    include=[
        "torch_ps.common",
        "torch_ps.ps.core",
        "torch_ps.ps.transport.boundary",
        "torch_ps.ps.checkpoint.manifest",
        "torch_ps.ps.checkpoint.tensor_file",
    ]
):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
