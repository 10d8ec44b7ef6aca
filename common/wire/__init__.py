"""What crosses the wire beside protobuf messages: frames, addresses, terms and votes."""
