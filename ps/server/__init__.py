"""The server's shell: commands, gRPC methods and the composition root of one process."""
