"""Export targets: what a Program can be written as."""
