"""Speculative decoding: a draft proposes tokens, and the model verifies several at once."""
