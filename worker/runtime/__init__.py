"""The process around a worker: devices, signals, TLS and token settings, launcher variables."""
