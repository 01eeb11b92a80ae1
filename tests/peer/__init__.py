"""transformers' own model tests, run on lowered models: see docs/results/peer-tests.md.

distribution.py    finds the tests that were fetched, and stands in for what they lack
kinds.py           the kinds of model, their testers, and every flag and override
suites.py          makes a test case of a kind, and runs it
`python -m tests.peer KIND [TEST ...]` runs one kind.
"""
