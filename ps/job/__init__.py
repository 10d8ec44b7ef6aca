"""One shard's state between its sockets and its engine: members, seeding, samples, who serves."""
