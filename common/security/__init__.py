"""TLS files and tokens: read, checked, and read again when they are renewed."""
