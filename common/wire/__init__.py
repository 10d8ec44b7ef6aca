"""What crosses the wire beside protobuf messages: frames, addresses, status codes, votes."""
