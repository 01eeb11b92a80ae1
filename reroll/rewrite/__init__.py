"""The engine: capture, raise, reroll, Programs and their weights, passes and their manager."""
