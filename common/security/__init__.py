"""TLS files, tokens and gRPC credentials."""
