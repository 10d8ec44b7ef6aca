"""The worker side: client library, optimizer, ready-made tasks, launcher."""

import os

# What gRPC reads when it is loaded; what a user has set stays. A DataLoader forks processes that never call gRPC: its
# handlers for that would be skipped, with a line for each fork. Of a handshake that failed it has a line of its own,
# which stands before our message and says less; a server reads those, see ps/observability/grpc_log.py.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
