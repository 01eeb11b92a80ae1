"""Looking at models: what a capture found, how far two models are apart, and what they generate."""
