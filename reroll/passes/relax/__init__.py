"""Give the layers of a shared block a low-rank residual each."""
