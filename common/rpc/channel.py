"""gRPC settings that both ends share.

Source: https://github.com/grpc/grpc/blob/master/include/grpc/impl/channel_arg_names.h
"""

from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES

SERVICE = "torch_ps.v1.ParameterServer"

#: Key of the metadata of an Exchange with which a worker tells why no faster carrier carries it, and the longest text.
CARRIER_KEY, MAX_REASON = "torch-ps-carrier", 200

Options = tuple[tuple[str, int | str], ...]

OPTIONS: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Detects a peer that vanished without closing its connection within a minute; heartbeats detect it sooner. On a
    # slow link the answer to a ping waits behind a megabyte or two that gRPC and the kernel have buffered already.
    # gRPC 1.85 uses the timeout of pings, not that of keepalive.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # On a saturated link pings wait in a queue and arrive together; that is no reason to close the connection.
    ("grpc.http2.max_ping_strikes", 0),
    # A server may come back under its name at another address. After a failure a channel looks the name up again, but
    # for half a minute it would not.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # A new channel makes a connection of its own: the one that another channel has may lead to a host that vanished.
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that waits for its server notices within a second that it is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name this is the longest duration of one attempt, TLS and the server's first frame included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # Servers of the job are never behind a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    # Two servers on one port would each see half of the workers.
    ("grpc.so_reuseport", 0),
)

#: ``OPTIONS`` of a standby. A message of its primary is as long as the list of data sets, and may go with a bucket.
STANDBY_OPTIONS: Options = tuple((dict(OPTIONS) | {"grpc.max_receive_message_length": -1}).items())

#: Seconds in which a new connection has to complete its handshake.
HANDSHAKE_SECONDS = 10


def server_options(connections: int, *, anybody: bool) -> Options:
    """``OPTIONS`` and the limits on peers of a server.

    Args:
        connections: most open connections; further ones are closed at once.
        anybody: True if clients are not authenticated and the network is not declared trusted.
    """
    return (
        *(dict(OPTIONS) | {"grpc.max_send_message_length": -1}).items(),  # to a standby; see STANDBY_OPTIONS
        # Flow-control windows that grow with the rate of a link would buffer whole messages of calls that are not read,
        # gigabytes in a flood of calls. Without growth a message that is read gets the window it needs a round trip
        # later, each message anew: a third of the time on a 1 Gb/s link whose queues are full.
        ("grpc.http2.bdp_probe", int(not anybody)),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.http2.settings_timeout", HANDSHAKE_SECONDS * 1000),
        # A process has one connection with a handful of open calls; several workers of a host may share one.
        ("grpc.max_concurrent_streams", 128),
        # Bytes of a call's metadata: an authorization header and the headers that gRPC adds.
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        # Connections without an open call are closed.
        ("grpc.max_connection_idle_ms", 60_000),
    )


def method(name: str) -> str:
    """Full name of a method of the service, for gRPC."""
    return f"/{SERVICE}/{name}"
