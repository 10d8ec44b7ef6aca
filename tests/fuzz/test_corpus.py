"""Interesting inputs are read or refused, as are the seeds and what is cut out of them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds
from torch_ps.common.errors import CheckpointError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import unpack_all
from torch_ps.ps.checkpoint import manifest as manifests

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_of_the_corpus_is_read_or_refused(name: str) -> None:
    inputs = [path.read_bytes() for path in FILES if path.parent.name == name]
    assert inputs
    for data in inputs:
        TARGETS[name](data)


def test_seeds_are_read_to_their_end() -> None:
    """A fuzzer that begins with what is refused at once does not come far."""
    found = seeds()
    assert len(list(unpack_all(found["message"][0], pb.UpHeader))) == 3
    assert manifests.parse(found["body"][0], "x").version == 12
    assert manifests.parse_shard(found["body"][1], "x").version == 12
    assert manifests.body_of(found["document"][0], "checkpoint", "x") == found["body"][0]
    with pytest.raises(CheckpointError):
        manifests.body_of(found["document"][0][:-1], "checkpoint", "x")


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150)
@given(data=st.data())
def test_right_input_with_a_piece_replaced_is_read_or_refused(name: str, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(seeds()[name]))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 8)))
    TARGETS[name](whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:])


FOUND = {
    "sections": [
        # A number without bounds: int(inf) is an OverflowError, which ended a server with a traceback.
        b'{"sets": [{"name": "", "size": 1e400, "seed": 0, "shuffled": true, "epoch": 0, "left": []}]}',
    ],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_a_crash_once_is_refused(name: str) -> None:
    for data in FOUND[name]:
        TARGETS[name](data)
