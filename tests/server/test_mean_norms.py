"""Norms of mean gradients, frame by frame: an answer that was lost is given again, whatever other workers ask."""

import torch

from tests.support.jobs import job
from tests.support.raw_worker import RawWorker, raw_workers
from tests.support.threads import at_once
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack

PARAMS = {"a": torch.linspace(-1.0, 1.0, 4)}
HYPER: Hyper = {"lr": 0.5}


def measure(worker: RawWorker, step: int, turn: int, gradient: torch.Tensor) -> None:
    header = pb.Measure(step=step, bucket=0, round=turn, power=2.0, weight=1.0)
    worker.send(0, pack(pb.UpHeader(measure=header), (gradient.numpy().tobytes(),)))


def measured(worker: RawWorker) -> pb.Measured:
    return worker.header_of_answer()[0].measured


def test_norm_is_kept_for_a_repeated_question_though_a_late_worker_asks_in_a_later_round() -> None:
    ones, threes = torch.ones(4), torch.full((4,), 3.0)
    with job(workers=2) as servers, raw_workers(servers, PARAMS, ("w0", "w1"), hyper=HYPER) as (w0, w1):
        at_once(lambda: w0.pull(0), lambda: w1.pull(0))
        for worker in (w0, w1):
            worker.push(0, ones)
        for worker in (w0, w1):
            worker.answer()
        measure(w0, 1, 0, ones)
        measure(w1, 1, 0, threes)
        assert list(measured(w0).norm) == list(measured(w1).norm) == [4.0]
        measure(w1, 0, 9, threes)
        assert list(measured(w1).contributor) == ["w1"]
        w0.open()  # the answer was lost with the connection
        measure(w0, 1, 0, ones)
        again = measured(w0)
        assert list(again.norm) == [4.0]
        assert list(again.contributor) == ["w0", "w1"]
