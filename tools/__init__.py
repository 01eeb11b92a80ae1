"""Scripts that make the models and texts for tests and examples; no part of the package."""
