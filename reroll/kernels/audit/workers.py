"""Start a process that compiles, from one that may be interpreting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from reroll.errors import RerollError

ROOT = Path(__file__).parents[3]


class Worker:
    """A `worker` process that runs one job at a time, and ends with the `with` block."""

    def __enter__(self) -> Self:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reroll.kernels.audit.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **job: Any) -> dict[str, Any]:
        """Return the answer to a job; raise RerollError if the process dies."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RerollError(
                "the process that compiles kernels died",
                where=json.dumps(job),
                hint="run python -m reroll.kernels.audit.worker and give it that line",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
