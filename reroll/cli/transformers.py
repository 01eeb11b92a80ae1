"""Run transformers' own command for models that reroll saved: `python -m reroll.cli.transformers`.

The arguments are those of `transformers`: `serve`, `chat` and others. That command imports no
classes that load a saved model; this one imports reroll first.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run transformers' command."""
    from transformers.cli.transformers import main as transformers_command

    sys.argv[0] = "transformers"
    transformers_command()


if __name__ == "__main__":
    main()
