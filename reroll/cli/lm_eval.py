"""Run lm-eval's own command for models that reroll saved: `python -m reroll.cli.lm_eval ARGUMENTS`.

The arguments are those of `lm_eval`. That command imports transformers without the classes that
load a saved model; this one imports reroll first.
"""

from __future__ import annotations

import sys

from reroll.errors import UsageError
from reroll.evaluate.harness import need_harness


def main() -> None:
    """Run lm-eval's command."""
    try:
        need_harness()
    except UsageError as error:
        sys.exit(f"error: {error}")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
