"""The generated code is what ``proto/`` says, and loads with the oldest and the newest protobuf.

The compiler stands apart from the other packages (``scripts/protoc.txt``), with the oldest protobuf that is supported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROTOC = Path(sys.prefix) / "protoc"
ROUND_TRIP = """
import google.protobuf
from torch_ps.common.pb import parameter_server_pb2 as pb
frame = pb.UpFrame(header=[pb.UpHeader(push=pb.Push(step=3, bucket=1, weight=2.0, codec="fp16"))], payload=b"abc")
assert pb.UpFrame.FromString(frame.SerializeToString()) == frame
print(google.protobuf.__version__, frame.SerializeToString().hex())
"""

needs_protoc = pytest.mark.skipif(
    not (PROTOC / "grpc_tools").is_dir(), reason="the compiler is not installed: scripts/protos --setup"
)


def under(path: str) -> tuple[str, str]:
    """The protobuf version and the bytes of a frame, in a fresh interpreter where every warning is an error."""
    environment = {**os.environ, "PYTHONPATH": path}
    out = subprocess.check_output(
        [sys.executable, "-W", "error", "-c", ROUND_TRIP], env=environment, text=True, cwd=ROOT
    )
    version, encoded = out.split()
    return version, encoded


@needs_protoc
def test_generated_code_is_what_proto_says(tmp_path: Path) -> None:
    protos = sorted(ROOT.glob("proto/*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=proto"]
    targets = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(PROTOC)}
    subprocess.check_call([*command, *targets, *(path.name for path in protos)], env=environment, cwd=ROOT)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "common/pb").glob("*_pb2*.py*")}
    assert fresh
    assert kept == fresh, "run make proto and commit the result"


@needs_protoc
def test_generated_code_loads_with_the_oldest_protobuf_and_with_ours_and_says_the_same() -> None:
    oldest, from_oldest = under(f"{PROTOC}{os.pathsep}{ROOT}")
    ours, from_ours = under(str(ROOT))
    assert oldest == "6.31.1"
    assert int(ours.split(".")[0]) >= 6
    assert from_oldest == from_ours


def test_generated_code_names_a_protobuf_that_every_supported_one_accepts() -> None:
    for path in (ROOT / "common/pb").glob("*_pb2.py"):
        line = next(line for line in path.read_text().splitlines() if line.startswith("# Protobuf Python Version: "))
        assert tuple(int(part) for part in line.split()[-1].split(".")) <= (6, 31, 1)
