"""Calls and streams to the servers: gRPC, Unix sockets, retries, and which server of a shard serves."""
