"""gRPC settings that both ends share.

Source: https://github.com/grpc/grpc/blob/master/include/grpc/impl/channel_arg_names.h
"""

from torch_ps.common.frames import MAX_MESSAGE_BYTES

SERVICE = "torch_ps.v1.ParameterServer"

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Notices a peer that vanished without closing its connection; well under the lease.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # On a saturated link pings wait in a queue and arrive in a bunch; that is no reason to hang up.
    ("grpc.http2.max_ping_strikes", 0),
    # A worker that waits for its server must notice within a second that it is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # The address is a server of the job, never something behind a proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # Two servers on one port would each see half of the workers.
    ("grpc.so_reuseport", 0),
)


def method(name: str) -> str:
    """Full path of one method of the contract."""
    return f"/{SERVICE}/{name}"
