"""The intermediate representation: Programs, loops, ops, weights, and their text."""
