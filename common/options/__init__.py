"""Options: each declared once, read from flags, the environment and TOML files."""
