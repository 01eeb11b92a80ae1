"""Lower a Program to a torch module: from graphs to code and a module tree."""
