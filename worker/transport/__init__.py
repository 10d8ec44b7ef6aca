"""How a worker reaches the servers: unary calls, streams, retries, and which server of a shard serves."""
