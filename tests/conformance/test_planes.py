"""Memory, sockets and gRPC carry the same: bits, counts and codecs do not depend on the plane, nor on who uses which.

gRPC is what everything else here was first shown on; the other carriers are compared with it to the bit.
"""

import contextlib
import gc
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.pairwise import pairwise
from tests.support.processes import Child
from tests.support.proxy import Proxy
from tests.support.raw import raw, secret_of
from tests.support.raw_worker import raw_workers
from tests.support.threads import at_once
from torch_ps.common.errors import ConfigError
from torch_ps.common.host_id import host_id
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import pack
from torch_ps.worker.transport.link import Link

PLANES = ("memory", "network")
STEPS = 5


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 3))


def train(
    servers: Servers, rank: int, plane: str, spec: str, model: torch.nn.Module, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Five steps of one worker on its own data; parameters and buffers at the end."""
    inner = getattr(torch.optim, spec)(model.parameters(), lr=0.05, **({"momentum": 0.9} if spec == "SGD" else {}))
    data = torch.Generator().manual_seed(rank)
    with torch_ps.ParameterServerOptimizer(
        inner, model, str(servers), name=f"w{rank}", plane=plane, **options
    ) as optimizer:
        assert len(optimizer.workers) >= 1
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 20, generator=data)).square().mean().backward()
            optimizer.step()
        return tuple(value.clone() for value in model.state_dict().values())


def together(planes: tuple[str, ...], spec: str, *, shards: int = 1, **options: Any) -> list[torch.Tensor]:
    """What all workers hold after a synchronous job, worker k on ``planes[k]``; the same on each of them."""
    with job(workers=len(planes), shards=shards, bucket_size=2**-10) as servers:
        # Every worker builds its model before any starts: the seed is the process's.
        models = [net() for _ in planes]
        found = at_once(
            *(
                lambda rank=rank, plane=plane, start=start: train(servers, rank, plane, spec, start, **options)
                for rank, (plane, start) in enumerate(zip(planes, models, strict=True))
            )
        )
    first, *others = found
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return list(first)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("SGD", {}),
        ("AdamW", {}),
        ("SGD", {"compress": "fp16", "compress_pull": "bf16"}),
        ("SGD", {"compress": "int8", "compress_pull": "int8"}),
        ("SGD", {"compress": "topk:0.1"}),
    ],
    ids=["momentum", "AdamW", "fp16", "int8", "topk"],
)
def test_bits_do_not_depend_on_the_plane(spec: str, options: dict[str, Any]) -> None:
    expected = together(("grpc", "grpc"), spec, **options)
    for planes, shards in ((("memory", "memory"), 1), (("network", "network"), 3), (("network", "memory"), 1)):
        if shards > 1 and options:
            continue  # a scale per bucket depends on how buckets are cut, whatever the plane
        found = together(planes, spec, shards=shards, **options)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (planes, shards)


@contextlib.contextmanager
def clients(servers: Servers, planes: tuple[str, ...], size: int, lr: float) -> Iterator[list[torch_ps.Client]]:
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}", plane=plane))
            for i, plane in enumerate(planes)
        ]
        for client in found:
            client.init({"x": torch.ones(size)}, torch_ps.OptimizerSpec("SGD", lr=lr))
        yield found


@pytest.mark.parametrize("mode", ["sync", "async", "ssp"])
def test_every_push_counts_once_while_planes_are_mixed(mode: str) -> None:
    """One-hot pushes of exact size from all workers at once: the parameters are the count."""
    planes = ("memory", "network", "grpc")
    with job(mode=mode, workers=3, bucket_size=2**-10) as servers, clients(servers, planes, 3000, 2**-10) as workers:

        def push(index: int) -> None:
            gradient = torch.zeros(3000)
            gradient[index::3] = 3.0 if mode == "sync" else 1.0  # a mean of three
            for _ in range(40):
                workers[index].push({"x": gradient})

        at_once(*(lambda index=index: push(index) for index in range(3)))
        assert workers[0].pull().params["x"].eq(1 - 40 / 1024).all()


@pytest.mark.parametrize("plane", PLANES)
def test_no_reader_sees_a_mixture_while_another_worker_writes(plane: str) -> None:
    """All elements of a bucket move alike, so a copy that holds two values is torn."""
    size = 1 << 18
    with job(mode="async", workers=2) as servers, clients(servers, (plane, "memory"), size, 2**-20) as (reader, writer):
        ones = {"x": torch.ones(size)}

        def write() -> None:
            for _ in range(150):
                writer.push(ones)

        def read() -> None:
            for _ in range(150):
                x = reader.pull().params["x"]
                assert x.eq(x[0]).all()

        at_once(write, read)


@pytest.mark.parametrize("plane", PLANES)
def test_staleness_is_conserved_while_all_push_at_once(plane: str) -> None:
    """C3 holds if a worker computes from the very version that its own push made, not from a fresher one."""
    with job(mode="async", workers=3) as servers, clients(servers, (plane,) * 3, 64, 2**-10) as found:

        def push(client: torch_ps.Client) -> None:
            first = base = client.pull().version
            staleness = 0
            for _ in range(150):
                result = client.push({"x": torch.ones(64)}, base=base)
                base = result.version
                staleness += result.staleness
            assert staleness == base - first - 150  # what the others have pushed meanwhile

        at_once(*(lambda client=client: push(client) for client in found))


def test_killed_worker_leaves_no_memory_behind_and_the_others_go_on() -> None:
    with job(mode="async", workers=2, lease=2.0) as servers, clients(servers, ("memory",), 1000, 2**-10) as (other,):
        log = servers.processes[0].log.with_name("victim")
        victim = Child("tests.support.workers:push_for_ever", (str(servers), "victim", 1000), log)
        try:
            until(lambda: len(servers.status().worker) == 2, "the victim has joined")
            until(lambda: servers.status().worker[0].clock + servers.status().worker[1].clock > 20, "it pushes")
        finally:
            victim.send(signal.SIGKILL)
            victim.wait(30)
        until(lambda: len(servers.status().worker) == 1, "its lease has ended")
        pulled = other.pull().version
        assert other.push({"x": torch.ones(1000)}).version > pulled
        maps = Path(f"/proc/{servers.processes[0].pid}/maps").read_text(encoding="utf-8")
        assert maps.count("memfd:torch-ps") == 3  # parameters, and gradients and answers of the one that lives
    assert not [name for name in os.listdir("/dev/shm") if "torch-ps" in name]


def test_connection_through_a_proxy_carries_the_bytes_unless_memory_is_insisted_on() -> None:
    gradient = {"x": torch.ones(100_000)}
    for plane, carried in (("auto", True), ("memory", False)):
        with (
            job() as servers,
            Proxy(servers.addresses[0]) as proxy,
            torch_ps.Client(proxy.address, name="w0", plane=plane) as client,
        ):
            client.init({"x": torch.zeros(100_000)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            before = proxy.num_bytes
            client.push(gradient)
            assert (proxy.num_bytes - before > 700_000) == carried  # the proxy counts what it has passed on, a bit late
            assert servers.status().worker[0].shares_memory != carried


def test_memory_that_was_insisted_on_is_used_and_a_wrong_word_refused() -> None:
    with job() as servers:
        with pytest.raises(ConfigError, match="plane must be one of auto, memory, network, grpc; got 'shared'"):
            torch_ps.Client(str(servers), plane="shared")
        with clients(servers, ("memory",), 1000, 1.0) as (worker,):
            worker.push({"x": torch.ones(1000)})
            assert worker.pushed_bytes == 4000
        sent = servers.processes[0].output
    assert "Traceback" not in sent


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (pb.ArenaOffer(host="another", pid=1, fd=3, token=bytes(16), size=8192), "it is on another host"),
        (pb.ArenaOffer(host=host_id(), pid=os.getpid(), fd=0, token=bytes(16), size=1), "it has 1 bytes"),
        (pb.ArenaOffer(), "it is on another host"),
    ],
    ids=["other host", "other size", "empty"],
)
def test_offer_that_cannot_be_mapped_is_answered_with_the_reason(offer: pb.ArenaOffer, reason: str) -> None:
    with job() as servers, clients(servers, ("network",), 8, 1.0) as (worker,):
        link = Link(address.parse(servers.addresses[0]))
        session = servers.status().worker[0].session
        secret = worker._session.identity.secret
        reply = link.share(pb.ShareRequest(worker="w0", session=session, secret=secret, gradients=offer), 30)
        link.close()
        assert not reply.HasField("parameters")
        assert reason in reply.reason
        worker.push({"x": torch.ones(8)})


@pytest.mark.parametrize("region", ["parameters", "gradients"])
def test_nobody_else_writes_to_the_memory_of_a_server_or_of_another_worker(region: str) -> None:
    with job() as servers, clients(servers, ("memory",), 1000, 1.0) as (worker,):
        memory = worker._session.shared_memory.shards[0]
        arena = memory.parameters.kept if region == "parameters" else memory.gradients
        file = os.open(f"/proc/{arena.offer.pid}/fd/{arena.offer.fd}", os.O_RDWR)
        for attempt in (
            lambda: mmap.mmap(file, arena.offer.size),
            lambda: os.pwrite(file, bytes(64), 4096),
            lambda: os.ftruncate(file, 4096),
        ):
            with pytest.raises(PermissionError):
                attempt()
        os.close(file)
        worker.push({"x": torch.ones(1000)})
        assert worker.pull().params["x"].tolist() == [0.0] * 1000


@pytest.mark.parametrize(("size", "message"), [(32, "shares none with this shard"), (1 << 40, "shares none")])
def test_gradient_in_memory_that_is_not_shared_is_refused(size: int, message: str) -> None:
    with (
        job(mode="async") as servers,
        raw(servers.addresses[0]) as peer,
        clients(servers, ("network",), 8, 1.0) as (worker,),
    ):
        with peer.worker("liar", {"x": torch.zeros(8)}) as greeting:
            push = pb.Push(step=0, bucket=0, base=0, weight=1, codec="none", arena_bytes=size)
            assert message in str(peer.exchange(greeting, pack(pb.UpHeader(push=push))))
        worker.push({"x": torch.ones(8)})


class Odd(torch.nn.Module):
    """Tensors that can live in shared memory beside some that cannot, for they begin in the middle of a cache line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.odd = torch.nn.Linear(16, 32), torch.nn.Linear(32, 3)
        self.last = torch.nn.Linear(3, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.tanh(self.odd(torch.tanh(self.first(x)))))
        return y


def _keeps(model: torch.nn.Module) -> None:
    """Nothing but the training itself."""


def _clamps(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.05, 0.05)


def _swaps(model: torch.nn.Module) -> None:
    """Other values for an evaluation, and back, behind the back of autograd."""
    kept = [parameter.data.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.zero_()
    for parameter, values in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(values)


def _moves(model: torch.nn.Module) -> None:
    """To storage of its own, as ``model.to`` gives it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize(
    ("change", "overlap", "set_to_none", "mode"),
    pairwise([_keeps, _clamps, _swaps, _moves], ["off", "on"], [True, False], ["sync", "async"]),
)
def test_what_a_loop_does_to_tensors_in_shared_memory_counts_as_it_does_over_the_network(
    change: Any, overlap: str, set_to_none: bool, mode: str
) -> None:
    ends = []
    for plane in PLANES:
        model, data = Odd(), torch.Generator().manual_seed(0)
        with (
            job(mode=mode, bucket_size=2**-10) as servers,
            torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                model,
                str(servers),
                plane=plane,
                overlap=overlap,
            ) as optimizer,
        ):
            for _ in range(6):
                optimizer.zero_grad(set_to_none=set_to_none)
                model(torch.randn(8, 16, generator=data)).square().mean().backward()
                gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
                optimizer.step()
                # A push takes gradients as they are and leaves them so.
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
                change(model)
            optimizer.zero_grad()
            optimizer.step()  # no gradient anywhere: the servers' parameters come as they are
        ends.append([value.clone() for value in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_parameters_live_in_the_servers_memory_and_are_the_models_own_when_it_leaves() -> None:
    model = torch.nn.Linear(64, 64)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with job() as servers:
        optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, str(servers))
        shared = [parameter.data_ptr() for parameter in model.parameters()]
        assert not set(before) & set(shared)
        for _ in range(3):
            model(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        assert [parameter.data_ptr() for parameter in model.parameters()] == shared
        # Gradients that outlive a push live there too, so that the next backward adds to them where the server reads.
        places = [parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        assert [p.grad.data_ptr() for p in model.parameters() if p.grad is not None] == places
        values = [parameter.clone() for parameter in model.parameters()]
        optimizer.close()
    assert not set(shared) & {parameter.data_ptr() for parameter in model.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize("plane", PLANES)
def test_worker_that_has_left_keeps_no_file_open(plane: str) -> None:
    def train(servers: Servers) -> int:
        model = torch.nn.Linear(64, 64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers), plane=plane) as optimizer:
            model(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        del optimizer, sgd, model
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with job() as servers:
        train(servers)
        before = train(servers)
        # gRPC closes its own a moment later.
        until(lambda: train(servers) <= before, "no more files are open than before")


def test_model_is_its_own_again_when_a_push_fails() -> None:
    model = torch.nn.Linear(64, 64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        job(workers=2) as servers,
        torch_ps.ParameterServerOptimizer(sgd, model, str(servers), timeout=0.5) as optimizer,
    ):
        shared = {parameter.data_ptr() for parameter in model.parameters()}
        model(torch.ones(1, 64)).sum().backward()
        with pytest.raises(torch_ps.WaitTimeout):  # the other worker never comes
            optimizer.step()
        assert not shared & {parameter.data_ptr() for parameter in model.parameters()}


def test_memory_that_is_withdrawn_carries_nothing_more() -> None:
    with (
        job() as servers,
        raw_workers(servers, {"x": torch.zeros(3)}, hyper={"lr": 1.0}) as (worker,),
        raw(str(servers)) as peer,
    ):
        worker.share()
        assert worker.pull(0).header.place == pb.PARAMETERS
        request = pb.ShareRequest(worker="w0", session=worker.session, secret=secret_of("w0"))
        assert peer.share(request).reason == "it is on another host"
        worker.push(0, torch.ones(3))
        answer = worker.answer()
    assert answer.header.place == pb.FRAME
    assert answer.values.tolist() == [-1, -1, -1]
