"""The trips of a loop as columns: lanes that say which weights, tokens and state each has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from reroll.evaluate.pages import escape, scroll, size
from reroll.evaluate.picture import Exit, LoopPicture, Sharing, TripPicture

# columns are as wide as there is room for, within these
NARROWEST, ROOM = 18, 520
LETTER = 6.4

STYLE = """
:root { --l: .86; --c: .095; --arc: .6; }
@media (prefers-color-scheme: dark) { :root { --l: .44; --c: .085; --arc: .72; } }
.loop .scroll { container-type: inline-size; }
.lanes { display: grid; grid-template-columns: repeat(var(--n), minmax(var(--w), 1fr));
  gap: 2px 1px; min-width: calc(var(--n) * (var(--w) + 1px)); font-size: 11px; line-height: 1.3;
  padding-bottom: 4px; }
.label { grid-column: 1 / -1; position: sticky; left: 0; max-width: 100cqi; color: var(--soft);
  font-size: 12.5px; line-height: 1.4; margin-top: .55rem; justify-self: start; }
.label b { color: var(--ink); font-weight: 600; }
.arcs { grid-column: 1 / -1; width: 100%; display: block; overflow: visible; }
.arcs path { fill: none; stroke: oklch(var(--arc) .12 var(--h)); stroke-width: 1.6px;
  vector-effect: non-scaling-stroke; }
.cell { text-align: center; border-radius: 3px; background: var(--tint); padding: 3px 0;
  overflow: hidden; white-space: nowrap; font-variant-numeric: tabular-nums; min-width: 0; }
.cell.block { background: oklch(var(--l) var(--c) var(--h)); font-weight: 600; padding: 6px 0; }
.cell.own { padding: 6px 0; color: var(--soft); }
.cell.none { background: none; color: var(--soft); }
.cell.run { white-space: normal; }
.cell.tall { writing-mode: vertical-rl; text-align: left; padding: 6px 0; max-height: 12em;
  justify-self: stretch; display: flex; align-items: center; justify-content: flex-start; }
.cell.exit { background: none; text-align: right; color: var(--strong); font-weight: 700; }
.cell.trip { background: none; color: var(--soft); padding: 0; }
.bar { height: 52px; display: flex; align-items: flex-end; position: relative;
  border-bottom: 1px solid var(--line); }
.bar i { position: absolute; bottom: 0; left: 1px; right: 1px; border-radius: 2px 2px 0 0; }
.bar i:first-child { background: color-mix(in srgb, var(--accent) 38%, var(--card)); }
.bar i:last-child:not(:first-child) { background: var(--accent); left: 25%; right: 25%; }
"""


def lanes(loop: LoopPicture, tallest: int) -> str:
    """The lanes of a loop, in a box of their own; `tallest` is the state that fills the height."""
    parts = [
        *_blocks(loop),
        *_residuals(loop),
        *_mixings(loop.trips),
        *_exits(loop.exits),
        *_states(loop, tallest),
        *_label("<b>Trips</b>"),
        *(
            _cell(t.number, t.number + 1, "trip", str(t.number), f"trip {t.number}")
            for t in loop.trips
        ),
    ]
    # numbers of three digits need more
    width = NARROWEST if len(loop.trips) <= 100 else 24
    style = f"--n: {len(loop.trips)}; --w: {width}px"
    return scroll(
        f'<div class="lanes" style="{style}">{"".join(parts)}</div>', f"trips of {loop.name}"
    )


def threshold(exit: Exit) -> str:
    """When tokens leave by an exit."""
    return "closed" if exit.threshold is None else f"above {exit.threshold:.4g}"


# ---- weights


def _blocks(loop: LoopPicture) -> Iterator[str]:
    shared = [s for s in loop.sharing if s.is_shared]
    unshared = [s for s in loop.sharing if not s.is_shared]
    for each in shared:
        kinds = _kinds(each.weights)
        words = (
            f"<b>{each.entries} blocks</b> of {escape(kinds)}; the same number is the same block"
        )
        yield from _label(words, ", ".join(each.weights))
        yield _arcs(each)
        yield from _cells(each)
    for number, each in enumerate(unshared):
        if shared or number:
            everywhere = None not in each.index
            having = sum(n is not None for n in each.index)
            where = "Each trip has its" if everywhere else f"{having} trips have their"
            where = "One trip has its" if having == 1 else where
            words = f"<b>{where} own</b> {escape(_kinds(each.weights))}"
            yield from _label(words, ", ".join(each.weights))
            if everywhere:
                continue
        else:
            yield from _label("<b>No weights are shared</b>: each trip has a block of its own")
        yield from _cells(each)


def _kinds(weights: Sequence[str]) -> str:
    """The kinds of some weights, each with how often it is there."""
    kinds = Counter(".".join(name.split(".")[-1 - name.endswith(".bias") :]) for name in weights)
    return ", ".join(
        weight if count == 1 else f"{weight} × {count}" for weight, count in kinds.items()
    )


def _cells(sharing: Sharing) -> Iterator[str]:
    for trip, entry in enumerate(sharing.index):
        if entry is None:
            yield _cell(trip, trip + 1, "none", "–", f"trip {trip} reads none of these")
        elif sharing.index.count(entry) == 1:
            yield _cell(trip, trip + 1, "own", str(entry), f"trip {trip}: block {entry}, its own")
        else:
            others = [t for t, e in enumerate(sharing.index) if e == entry]
            title = f"trip {trip}: block {entry}, of trips {', '.join(map(str, others))}"
            yield _cell(trip, trip + 1, "block", str(entry), title, f"--h: {hue(entry)}; ")


def hue(block: int) -> str:
    """The hue of a block: neighbours are far apart, by the golden angle."""
    return f"{(40 + 137.508 * block) % 360:.0f}"


def _arcs(sharing: Sharing) -> str:
    """Arcs from each use of a block to the next one."""
    last: dict[int, int] = {}
    pairs = []
    for trip, entry in enumerate(sharing.index):
        if entry is not None:
            if entry in last:
                pairs.append((entry, last[entry], trip))
            last[entry] = trip
    longest = max(b - a for _, a, b in pairs)
    height = 12 if longest == 1 else 46
    paths = []
    for entry, a, b in pairs:
        top = height - 4 - (height - 6) * (4 / 3) * ((b - a) / longest) ** 0.7 * 0.98
        curve = f"M{a + 0.5} {height}C{a + 0.5} {top:.1f} {b + 0.5} {top:.1f} {b + 0.5} {height}"
        paths.append(f'<path d="{curve}" style="--h: {hue(entry)}"/>')
    box = f'viewBox="0 0 {len(sharing.index)} {height}" preserveAspectRatio="none"'
    title = "<title>arcs join the trips that read one block</title>"
    size = f'class="arcs" height="{height}" aria-hidden="true"'
    return f"<svg {size} {box}>{title}{''.join(paths)}</svg>"


def _residuals(loop: LoopPicture) -> Iterator[str]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for each in loop.residuals:
        groups.setdefault(each.ranks, []).append(each.weight)
    for ranks, weights in groups.items():
        yield from _label(
            f"<b>Rank of the residuals</b> of {escape(_kinds(weights))}", ", ".join(weights)
        )
        texts = [(str(r) if r else "–", f"rank {r}" if r else "no residual") for r in ranks]
        yield from _runs(texts, "none" if not any(ranks) else "")


# ---- tokens and state


def _mixings(trips: Sequence[TripPicture]) -> Iterator[str]:
    known = {m.name: m.what for trip in trips for m in trip.mixings}
    texts = [(in_turn((m.name for m in t.mixings), " + ") or "–", mixed(t)) for t in trips]
    if len(known) == 1 and len(set(texts)) == 1:
        words = escape(mixed(trips[0]))
    else:
        words = "; ".join(
            f"{escape(name)}: {escape(description)}" for name, description in known.items()
        )
    yield from _label(f"<b>Tokens are mixed by</b> {words or 'nothing'}")
    yield from _runs(texts)


def mixed(trip: TripPicture) -> str:
    """What mixes tokens in one trip, in words."""
    return in_turn((m.what for m in trip.mixings), "; ") or "nothing"


def in_turn(texts: Iterable[str], between: str) -> str:
    """Texts one after another, those that repeat once with how often."""
    runs = [(text, len(list(group))) for text, group in groupby(texts)]
    return between.join(text if count == 1 else f"{text} × {count}" for text, count in runs)


def _exits(exits: Sequence[Exit]) -> Iterator[str]:
    if not exits:
        return
    if all(e.threshold is None for e in exits):
        words = f"after {', '.join(str(e.after) for e in exits)} trips; all are closed"
    else:
        words = ", ".join(f"after {e.after} trips ({threshold(e)})" for e in exits)
    yield from _label(f"<b>Exits</b> {escape(words)}")
    for each in exits:
        title = f"exit after {each.after} trips, {threshold(each)}"
        yield _cell(each.after - 1, each.after, "exit", "E▸", title)


def _states(loop: LoopPicture, tallest: int) -> Iterator[str]:
    if not tallest or not any(loop.state.values()):
        return
    contexts = sorted(loop.state, reverse=True)
    widths = ["narrow bars", "wide bars"] if len(contexts) == 2 else ["bars"]
    totals = [f"{size(loop.state[c])} at {c:,} tokens" for c in reversed(contexts)]
    words = "; ".join(f"{t} ({w})" for t, w in zip(totals, widths, strict=False))
    yield from _label(f"<b>State</b> {escape(words)}; full height is {size(tallest)} in one trip")
    for trip in loop.trips:
        title = ", ".join(f"{size(trip.state[c])} at {c:,} tokens" for c in contexts)
        bars = "".join(
            f'<i style="height: {100 * trip.state[c] / tallest:.2f}%"></i>' for c in contexts
        )
        column = f"grid-column: {trip.number + 1}"
        words = escape(f"trip {trip.number}: {title}")
        yield f'<div class="bar" style="{column}" title="{words}">{bars}</div>'


# ---- cells


def _label(words: str, title: str = "") -> Iterator[str]:
    """A line above a lane; `words` are HTML."""
    about = f' title="{escape(title)}"' if title else ""
    yield f'<div class="label"{about}>{words}</div>'


def _runs(texts: Sequence[tuple[str, str]], css_class: str = "") -> Iterator[str]:
    """Cells for what trips have, one for each run of equals; upright where that does not fit."""
    runs = []
    start = 0
    for (text, title), group in groupby(texts):
        stop = start + len(list(group))
        runs.append((start, stop, text, title))
        start = stop
    width = max(NARROWEST, ROOM / len(texts))
    # beside each other, parts of a text may stand in lines of their own
    longest = [max(map(len, text.split(" + "))) * LETTER for _, _, text, _ in runs]
    fits = all(n <= (stop - a) * width for n, (a, stop, _, _) in zip(longest, runs, strict=True))
    css_class = f"{css_class} run" if fits else f"{css_class} tall"
    for a, stop, text, title in runs:
        trips = f"trips {a} to {stop - 1}" if stop - a > 1 else f"trip {a}"
        yield _cell(a, stop, css_class, text, f"{trips}: {title}")


def _cell(start: int, stop: int, css_class: str, text: str, title: str, style: str = "") -> str:
    column = f"{style}grid-column: {start + 1} / {stop + 1}"
    words = escape(title)
    return f'<div class="cell {css_class}" style="{column}" title="{words}">{escape(text)}</div>'
