"""Plan an export: initialisers, states, and which trips become one Loop."""
