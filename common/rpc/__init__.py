"""What both ends share of gRPC: settings of a channel, errors as status codes, TLS and token as credentials."""
