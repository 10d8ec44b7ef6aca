"""TensorFlow with variables on /job:ps behind its C++ gRPC server, each worker with a graph of its own.

Sync is ``SyncReplicasOptimizer`` over momentum; async applies momentum on the server and reads each variable back after
its own step.
"""

import importlib
import json
import os
import socket
from contextlib import ExitStack
from typing import Any

import torch

from bench.model import shapes
from bench.peers.common import cut
from bench.rounds import LR, MOMENTUM, Job, flat, measure, scale

SERVER = "/job:ps/task:0/device:CPU:0"


def server(job: Job) -> None:
    with ExitStack() as stack:  # all at once, so that no two are the same
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(job.work.workers + 1)]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in bound]
    job.publish("cluster", json.dumps({"ps": addresses[:1], "worker": addresses[1:]}))
    _start(_load(), job, "ps", 0, job.work.workers).join()


def worker(job: Job, rank: int) -> None:
    tf = _load()
    graph = _Graph(tf, job, rank)
    target = _start(tf, job, "worker", rank, 1).target
    session = tf.Session(target, config=_config(tf, 1))
    start, gradient = flat(job.work.size)
    if rank == 0:
        session.run(tf.global_variables_initializer())
        session.run(graph.set_parameters, graph.feed(start))
        job.publish("set", "")
    job.published("set")
    session.run(tf.variables_initializer(tf.get_collection("mine")))
    session.run(graph.set_gradients, graph.feed(gradient.mul_(scale(job.work, rank))))
    if graph.sync is not None:
        session.run(tf.local_variables_initializer())
        session.run(graph.sync.chief_init_op if rank == 0 else graph.sync.local_step_init_op)
        job.publish(f"started{rank}", "")
        for other in range(job.work.workers):
            job.published(f"started{other}")
        if rank == 0:
            runner = graph.sync.get_chief_queue_runner()
            runner.create_threads(session, tf.train.Coordinator(), daemon=True, start=True)
            session.run(graph.sync.get_init_tokens_op(num_tokens=0))  # none in advance: a strict barrier

    def pulled() -> torch.Tensor:
        return torch.cat([torch.from_numpy(array).reshape(-1) for array in session.run(graph.mine)])

    measure(job, rank, session.make_callable(graph.round), pulled)
    os._exit(0)  # its server has no end


class _Graph:
    """The operations of one worker."""

    def __init__(self, tf: Any, job: Job, rank: int) -> None:
        self._size = job.work.size
        here, sizes = f"/job:worker/task:{rank}/device:CPU:0", shapes(job.work.size)

        def variables(name: str, **options: Any) -> list[Any]:
            zeros = tf.zeros_initializer()
            return [
                tf.get_variable(f"{name}{i}", shape, tf.float32, initializer=zeros, use_resource=True, **options)
                for i, shape in enumerate(sizes)
            ]

        with tf.device(SERVER):
            parameters = variables("parameter")
            step = tf.get_variable(
                "step", [], tf.int64, initializer=tf.zeros_initializer(), trainable=False, use_resource=True
            )
        with tf.device(here):
            gradients = variables(f"gradient{rank}_", trainable=False, collections=["mine"])
            self.mine = variables(f"pulled{rank}_", trainable=False, collections=["mine"])
            self._values = [tf.placeholder(tf.float32, shape) for shape in sizes]
            self.set_gradients = [g.assign(value).op for g, value in zip(gradients, self._values, strict=True)]
            pushed = [gradient.read_value() for gradient in gradients]
        self.sync = None
        if job.work.mode == "sync":
            count = job.work.workers
            self.sync = tf.train.SyncReplicasOptimizer(
                tf.train.MomentumOptimizer(LR, MOMENTUM), replicas_to_aggregate=count, total_num_replicas=count
            )
            with tf.device(SERVER):
                all_applied = self.sync.apply_gradients(list(zip(pushed, parameters, strict=True)), global_step=step)
            applied = [all_applied] * len(parameters)
        else:
            with tf.device(SERVER):
                momenta = variables("momentum", trainable=False)
                applied = [
                    tf.raw_ops.ResourceApplyMomentum(var=p.handle, accum=m.handle, lr=LR, grad=g, momentum=MOMENTUM)
                    for p, m, g in zip(parameters, momenta, pushed, strict=True)
                ]
        taken = []
        for parameter, mine, after in zip(parameters, self.mine, applied, strict=True):
            with tf.control_dependencies([after]):
                with tf.device(SERVER):
                    fresh = parameter.read_value()
                with tf.device(here):
                    taken.append(mine.assign(fresh).op)
        self.round = tf.group(*taken)
        with tf.device(SERVER):
            self.set_parameters = [p.assign(value).op for p, value in zip(parameters, self._values, strict=True)]

    def feed(self, values: torch.Tensor) -> dict[Any, Any]:
        return {place: each.numpy() for place, each in zip(self._values, cut(values, self._size), strict=True)}


def _load() -> Any:
    """Its interface of graphs and sessions."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="")
    module = importlib.import_module("tensorflow").compat.v1
    module.raw_ops = importlib.import_module("tensorflow").raw_ops
    module.disable_eager_execution()
    return module


def _config(tf: Any, threads: int) -> Any:
    return tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=threads)


def _start(tf: Any, job: Job, role: str, number: int, threads: int) -> Any:
    cluster = json.loads(job.published("cluster"))
    return tf.train.Server(cluster, job_name=role, task_index=number, config=_config(tf, threads))
