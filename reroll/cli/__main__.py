"""`python -m reroll.cli` is `reroll`."""

from reroll.cli import main

main()
