"""A server that asks for a vote at once, while the worker still opens its streams to the other shards."""

from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import ballots
from torch_ps.common.wire.frames import pack
from torch_ps.common.wire.terms import Term
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.transport.link import Link


def test_vote_is_cast_before_all_streams_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = pb.Ask(term=ballots.term_to_proto(Term(1, "P/1")), base=ballots.term_to_proto(Term()))
    message = pack(pb.DownHeader(ballot=pb.Ballot(ask=ask)))
    opened: list[Any] = []
    votes: list[int] = []
    really_open = Link.open

    def open_and_ask(link: Link, dialled: Any, on_message: Any, on_end: Any, place: Any) -> Any:
        opened.append(on_message)
        if len(opened) == 2:
            opened[0](message)
        return really_open(link, dialled, on_message, on_end, place)

    monkeypatch.setattr(Link, "open", open_and_ask)
    monkeypatch.setattr(ShardStreams, "send_unkept", lambda streams, shard, frame: votes.append(shard))
    with job(shards=2) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        assert client.push({"x": torch.ones(8)}).version == 1
    assert votes == [0]
