"""What a server reports about itself: metrics, health, traces, log lines of gRPC."""
