"""The harness of all benchmarks: options, tables of results that are kept, timing in turns.

A benchmark adds rows to a `Table`. `--json FILE` keeps them with the command and the commit, and
the same command goes on where it stopped. See `benchmarks/__main__.py` for how one is run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL = "models/smollm2-135m-instruct"
TEXT = Path("data/text")
WIKI = TEXT / "wiki.val.txt"

Row = dict[str, Any]


def parse_options(
    doc: str | None, *positional: str, words: Sequence[str] | None = None, **defaults: Any
) -> argparse.Namespace:
    """Parse words, or the command line: an option for each default, of its type; set the threads.

    A tuple takes values of its first item's type with commas between them, False is a flag, a type
    in the place of a default is an option without one, and positional names take several words;
    those that end in an asterisk may take none.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in positional:
        parser.add_argument(name.rstrip("*"), nargs="*" if name.endswith("*") else "+")
    for name, default in ({"threads": 1, "json": Path} | defaults).items():
        option = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(option, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(option, type=default)
        elif isinstance(default, tuple):
            parser.add_argument(option, type=partial(_items, type(default[0])), default=default)
        else:
            parser.add_argument(option, type=type(default), default=default)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    return options


def _items(kind: Callable[[str], Any], text: str) -> tuple[Any, ...]:
    mark = ";" if ";" in text else ","
    return tuple(kind(item.strip()) for item in text.split(mark) if item.strip())


class Table:
    """Rows of results as a Markdown table, printed as they come and kept in a file.

    `columns` maps titles to templates of `str.format`: "{}" is text, "{:.1f}" a number, aligned to
    the right. A title with an asterisk stands for all titles of numbers in the first row that it
    matches and no other column has. Further keys of a row are kept in the file and not shown.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        columns: Mapping[str, str],
        part: str = "",
        cases: Iterable[Row] = (),
    ) -> None:
        self.columns, self.rows, self.cases = dict(columns), list[Row](), list(cases)
        self.file: Path | None = options.json
        if self.file and part:
            self.file = self.file.with_stem(f"{self.file.stem}-{part}")
        self.command, self.commit = command(), commit()
        if self.file and self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept["command"] != self.command:
                raise SystemExit(f"{self.file} is of `{kept['command']}`: choose another --json")
            self.rows, self.commit, self.columns = kept["rows"], kept["commit"], kept["columns"]
            print("\n".join(markdown(self.columns, self.rows)))

    def missing(self, cases: Iterable[Row] | None = None) -> Iterator[Row]:
        """Cases without a row that has all their values: of these, or of the benchmark's."""
        for case in self.cases if cases is None else cases:
            if not any(case.items() <= {k: row.get(k) for k in case}.items() for row in self.rows):
                yield case

    def add(self, row: Row) -> None:
        """Print a row and keep it, with its commit if that is not the file's."""
        if not self.rows:
            self.columns = _expanded(self.columns, row)
            print("\n".join(markdown(self.columns)))
        if (now := commit()) != self.commit:
            row = row | {"commit": now}
        self.rows.append(row)
        print(_line(self.columns, row), flush=True)
        if self.file:
            result = {"command": self.command, "commit": self.commit, "machine": machine()}
            write_json(self.file, result | {"columns": self.columns, "rows": self.rows})


def _expanded(columns: Mapping[str, str], row: Row) -> dict[str, str]:
    found: dict[str, str] = {}
    further = [t for t, v in row.items() if t not in columns and isinstance(v, int | float)]
    for title, template in columns.items():
        titles = [t for t in further if fnmatchcase(t, title)] if "*" in title else [title]
        found |= {t: template for t in titles if t not in found}
    return found


def markdown(columns: Mapping[str, str], rows: Iterable[Row] = ()) -> list[str]:
    """The lines of a Markdown table; what is None or missing is an empty cell."""
    rules = ("---:" if ":" in template else "---" for template in columns.values())
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join(rules)} |"]
    return head + [_line(columns, row) for row in rows]


def _line(columns: Mapping[str, str], row: Row) -> str:
    cells = (
        template.format(value) if (value := row.get(title)) is not None else ""
        for title, template in columns.items()
    )
    return f"| {' | '.join(cells)} |"


def command() -> str:
    """The command that runs, as a user types it, but for the file of results."""
    module = Path(sys.argv[0]).stem
    start = "python -m benchmarks" + (f".{module}" if module != "__main__" else "")
    words = sys.argv[1:]
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    quoted = (f'"{word}"' if set(word) & set(" ()[]=,;") else word for word in words)
    return " ".join([start, *quoted])


def commit() -> str:
    """The commit that is measured, with a plus sign if files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """What a speed depends on."""
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(file: Path, content: Any) -> None:
    """Write a file whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm: int = 1,
    before: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call of each side, round by round in alternating order.

    So what else the machine does hits all sides alike. The first `warm` rounds are not counted.
    With `before`, each side runs once more before each call, to have its weights in the cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            if before:
                sides[name]()
            start = clock()
            sides[name]()
            if number >= warm:
                seconds[name].append(clock() - start)
    return seconds


def clock_of(threads: int) -> Callable[[], float]:
    """The processor's time for one thread: what a call takes with the machine to itself."""
    return time.process_time if threads == 1 else time.perf_counter


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median time of each side."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def best(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The shortest time of each side."""
    return {name: min(times) for name, times in seconds.items()}


def passing(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool
) -> Callable[[], None]:
    """A forward of these inputs, or that and the gradients of all of them."""
    leaves = [t.detach().requires_grad_(backward) for t in inputs]

    def run() -> None:
        out = forward(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return run


def run_process(words: Sequence[object], threads: int = 1, **environment: str) -> Row:
    """Run a command to its end: its output, seconds, and peak resident memory in MB.

    Seconds are those of the clock, and of the processor.
    """
    variables = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1") | environment
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in words],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{output[-2000:]}")
    seconds = time.perf_counter() - start
    return {
        "output": output,
        "seconds": seconds,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss * 1024 / 1e6,
    }


def told(error: Exception, most: int = 200) -> str:
    """The type of an error, and the first line of its message."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:most]}"


def original(model: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """The model in transformers, for inference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **arguments).eval()


def filled_cache(model: Any, tokens: int) -> Any:
    """A cache of a model with random keys and values of so many tokens."""
    from transformers import DynamicCache

    config, cache = model.config, DynamicCache(config=model.config)
    # a few numbers, over and over: making all of them takes longer than the steps
    few = 0.1 * torch.randn(1, config.num_key_value_heads, 128, config.head_dim, dtype=model.dtype)
    whole = few.repeat(1, 1, tokens // 128 + 1, 1)[:, :, :tokens]
    for layer in range(config.num_hidden_layers):
        cache.update(whole.clone(), whole.clone(), layer)
    return cache


def text_ids(model: str, file: Path, tokens: int) -> Tensor:
    """The first tokens of a text [tokens]."""
    from transformers import AutoTokenizer

    if not file.is_file():
        name = file.name.partition(".")[0]
        raise SystemExit(f"{file} is not there: make models NAMES=text:{name}")
    with file.open(encoding="utf-8") as opened:
        text = opened.read(16 * tokens)
    ids = AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False)
    return torch.tensor(ids[:tokens])


def progress(name: str) -> Callable[[Mapping[str, Any]], None]:
    """What tells on stderr, at every tenth step of a recovery, how far it is."""

    def tell(step: Mapping[str, Any]) -> None:
        if step["steps"] % 10 == 0:
            left = f"{step['seconds_left'] / 60:.0f} minutes left"
            print(f"  {name}: {step['stage']} loss {step['smooth']:.4g}, {left}", file=sys.stderr)

    return tell


def function_of(name: str) -> Any:
    """The function of a benchmark that a file of cases names, as `module.function`."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"benchmarks.{module}"), function)


def module_of(file: Path) -> Any:
    """The module in a Python file outside of packages, such as a bundle's `model.py`."""
    spec = spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = sys.modules[file.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
