"""Names of what a Program has for drafts: passes add it, recovery trains it, decoding reads it."""

from __future__ import annotations

# of an exit with an adapter: its output, and the first part of the names of its weights
EXIT_HIDDEN, EXIT_ADAPTER = "exit_hidden", "exit_adapter"
# of prompt tokens: the input that numbers them, and the weight with their embeddings
PROMPT_TOKENS = "prompt_tokens"
PROMPT_WEIGHT = f"{PROMPT_TOKENS}.weight"
