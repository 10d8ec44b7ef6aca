"""The worker side: client library, optimizer, ready-made tasks, launcher."""
