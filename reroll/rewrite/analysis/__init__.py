"""Ask a Program what it holds: layers, residual branches, phases, samples to run it on."""
