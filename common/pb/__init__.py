"""Generated from proto/parameter_server.proto; do not edit, run ``make proto``."""
