"""The worker side: client library, optimizer, ready-made tasks, launcher."""

import os

# A DataLoader forks processes that never call gRPC. Its handlers for that would be skipped, with a line for each fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
