"""What another server of the job says that it is."""

import grpc

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access


async def describe(connection: grpc.aio.Channel, access: Access, seconds: float) -> pb.JobDescription:
    """Ask it, and wait until it is there; without the model.

    Raises:
        AioRpcError: it has not answered within ``seconds``, or refuses.
    """
    call = connection.unary_unary(
        channel.method("Describe"), pb.DescribeRequest.SerializeToString, pb.JobDescription.FromString
    )
    reply: pb.JobDescription = await call(
        pb.DescribeRequest(), timeout=seconds, wait_for_ready=True, metadata=access.metadata
    )
    return reply
