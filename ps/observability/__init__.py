"""What a server shows of itself: metrics, health, traces, log lines of gRPC."""
