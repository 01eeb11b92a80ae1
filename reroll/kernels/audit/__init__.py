"""Compile every kernel for GPUs without having one, and measure the binaries.

families.py     which kernels there are, and for which shapes
candidates.py   which tiles they may have
compiling.py    one kernel ahead of time: registers, spills, shared memory, instructions
worker.py       a process that compiles, because Triton's interpreter is chosen at import
sweep.py        chooses tiles without spills and writes the manifest
__main__.py     compiles what the manifest ships, prints the table, fails on a spill
"""
