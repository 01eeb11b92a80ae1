"""Share weights between layers."""
