"""The server: one process per shard. Decisions are in ``core``, tensors in ``store``, sockets in ``servicer``."""
