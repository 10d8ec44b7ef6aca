"""The variables that torchrun gives a process, so that a script's ``torch.distributed`` works beside torch-ps.

    ps-run --process_group()--> RANK, WORLD_SIZE, MASTER_ADDR, ... --> init_process_group("gloo"), DistributedSampler

torch-ps itself reads RANK, WORLD_SIZE and LOCAL_RANK; gradients and parameters never go through that process group.
What torchrun says of its agent (TORCHELASTIC_...) is left out, as there is none.

Source: https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import socket

#: Variables of torchrun that are about other processes.
OF_PROCESSES = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "WORLD_SIZE",
)


def process_group(rank: int, world: int, master: str, *, one_host: bool) -> dict[str, str]:
    """The variables of one process.

    Args:
        rank: number of the process, from 0.
        world: number of processes.
        master: "HOST:PORT" at which rank 0 listens when a script calls ``init_process_group``.
        one_host: whether all processes are on one host; else each is alone on its own.
    """
    host, _, port = master.rpartition(":")
    local_rank, local_world = (rank, world) if one_host else (0, 1)
    values: dict[str, object] = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world,
        "GROUP_RANK": 0 if one_host else rank,
        "GROUP_WORLD_SIZE": 1 if one_host else world,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def free_master() -> str:
    """An address of this host with a port that is free now, as torchrun chooses one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"
