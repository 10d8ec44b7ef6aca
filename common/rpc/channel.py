"""gRPC settings that both ends share.

Source: https://github.com/grpc/grpc/blob/master/include/grpc/impl/channel_arg_names.h
"""

from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES

SERVICE = "torch_ps.v1.ParameterServer"

Options = tuple[tuple[str, int | str], ...]

OPTIONS: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Notices a peer that vanished without closing its connection, a minute after it was last heard of: whoever waits
    # has ways of its own that are faster. On a slow link an answer to a ping waits behind a megabyte or two that gRPC
    # and the kernel have taken already. It is the timeout of pings that counts, not that of keepalive (gRPC 1.85).
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # On a saturated link pings wait in a queue and arrive in a bunch; that is no reason to hang up.
    ("grpc.http2.max_ping_strikes", 0),
    # A worker that waits for its server must notice within a second that it is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name, how long one attempt may take, TLS and the server's first frame included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # The address is a server of the job, never something behind a proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # Two servers on one port would each see half of the workers.
    ("grpc.so_reuseport", 0),
)

#: Of a second connection to the same server, which shares nothing with the first.
APART: Options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))

#: Seconds in which a connection has to say what it is; a half-open one ends then.
HANDSHAKE_SECONDS = 10


def server_options(connections: int, *, anybody: bool) -> Options:
    """``OPTIONS``, and what bounds the peers of a server.

    Args:
        connections: open at a time; more are closed at once.
        anybody: may call, as nobody has to show a token or certificate, and nobody said that the network is trusted.
    """
    return (
        *OPTIONS,
        # Windows that grow with the rate of a link would hold whole messages of calls that nobody reads, gigabytes in
        # a flood of them. A message that is being read gets the window that it needs in any case, a round trip later,
        # and for each message another one: a third of the time on a link of 1 Gb/s whose queues are full.
        ("grpc.http2.bdp_probe", int(not anybody)),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.http2.settings_timeout", HANDSHAKE_SECONDS * 1000),
        # One process is one connection and has a handful of calls open; several of a host's workers may share one.
        ("grpc.max_concurrent_streams", 128),
        # Bytes of a call's metadata: an authorization header and what gRPC adds.
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        # Nobody stays who has no call open.
        ("grpc.max_connection_idle_ms", 60_000),
    )


def method(name: str) -> str:
    """Full path of one method of the contract."""
    return f"/{SERVICE}/{name}"
