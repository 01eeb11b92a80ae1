"""The state of a lowered module: cache layers and snapshots."""
