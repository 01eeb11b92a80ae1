"""The lowered models as transformers classes: configuration, loading, saving, generation."""
