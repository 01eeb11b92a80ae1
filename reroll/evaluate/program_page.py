"""The page on which a Program is seen, alone or beside another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from reroll.evaluate.pages import document, escape, number, scroll, size
from reroll.evaluate.picture import (
    Change,
    Exit,
    Line,
    LoopPicture,
    Picture,
    RegionPicture,
    Sharing,
    Stage,
    TripPicture,
)

STYLE = """
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; }
@media (max-width: 60rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
article { margin-top: 1.4rem; min-width: 0; } article > h2:first-child { margin-top: 0; }
.facts th.n { max-width: 18rem; overflow-wrap: anywhere; white-space: normal; }
.chain { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem .2rem; margin: 0 0 1rem;
  padding: 0; font-size: .85rem; }
.chain li { display: flex; align-items: center; min-width: 0; }
.chain li + li::before { content: "→"; color: var(--soft); margin-right: .2rem; }
.chain a { background: var(--tint); border-radius: 99px; padding: .1rem .65rem; color: var(--ink);
  text-decoration: none; overflow-wrap: anywhere; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .55rem .9rem; position: relative; }
.box + .box, .ends + .box, .box + .ends { margin-top: 1.1rem; }
.box + .box::before, .ends + .box::before, .box + .ends::before { content: "↓"; position: absolute;
  top: -1.25rem; left: 1.2rem; color: var(--soft); line-height: 1.4; }
.ends { position: relative; color: var(--soft); font-size: .82rem; padding: 0 .9rem; }
.loop { border: 2px solid var(--accent); padding: .75rem .9rem .9rem; }
.loop > header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .7rem; }
.times { margin-left: auto; color: var(--accent); font-weight: 600; white-space: nowrap; }
.loop p { font-size: .82rem; margin: .15rem 0 .5rem; }
.region summary { font-size: .85rem; } .weigh { color: var(--soft); }
details > summary { padding: .1rem 0; } details.more > summary { font-size: .85rem;
  font-weight: 600; margin-top: .9rem; }
.numbers { font-size: .82rem; } .numbers thead th { white-space: nowrap; }
.ops { font-size: .78rem; }
.ops td { white-space: nowrap; padding: .1rem .9rem .1rem 0; border: 0; }
.ops tr.minor td, .ops td:first-child { color: var(--soft); }
.ops tr:not(.minor) td:nth-child(2) { font-weight: 600; }
.ops td:last-child { color: var(--soft); } .ops .weight { color: var(--accent); }
.ops tr:hover td { background: var(--tint); }
.stages { list-style: none; margin: 0; padding: 0; counter-reset: stage -1; }
.stages > li { counter-increment: stage; border-left: 2px solid var(--line); margin-left: .7rem;
  padding: 0 0 1.1rem 1.5rem; position: relative; }
.stages > li::before { content: counter(stage); position: absolute; left: -.76rem; top: 0;
  width: 1.45rem; height: 1.45rem; border-radius: 50%; background: var(--tint); color: var(--ink);
  border: 1px solid var(--line); text-align: center; font-weight: 600; font-size: .75rem;
  line-height: 1.4rem; }
.stages h3 { overflow-wrap: anywhere; } .stages h3 small { font-weight: 400; color: var(--soft); }
.stages ul { margin: .2rem 0 .5rem; padding-left: 1.1rem; font-size: .85rem; color: var(--soft); }
"""


def page(picture: Picture, against: Picture | None = None) -> str:
    """The HTML page of a Program; `against` stands left of it, as what it is compared with."""
    shown = [picture] if against is None else [against, picture]
    title = " and ".join(each.name for each in shown)
    tallest = max(
        (t.state[c] for p in shown for x in p.loops for t in x.trips for c in t.state), default=0
    )
    parts = [f"<header><h1>{escape(title)}</h1>", f'<p class="note">{_about(shown)}</p></header>']
    parts.append(scroll(_facts(shown), "what the programs cost"))
    parts.append(f'<main class="{"pair" if len(shown) > 1 else "alone"}">')
    for side, each in enumerate(shown):
        parts += ["<article>", *_program(each, f"p{side}", tallest, len(shown) > 1), "</article>"]
    return document(title, [*parts, "</main>"], STYLE + LANES_STYLE)


def _about(shown: Sequence[Picture]) -> str:
    kinds = dict.fromkeys(f"{each.architecture}, {each.dtype}" for each in shown)
    return escape("; ".join(kinds))


def _facts(shown: Sequence[Picture]) -> str:
    """The table of what each costs, side by side."""
    rows: list[tuple[str, list[int], Callable[[int], str]]] = []
    rows.append(("parameters", [p.parameters for p in shown], number))
    rows.append(("weights", [p.bytes for p in shown], size))
    rows.append(("FLOPs per token", [p.flops for p in shown], number))
    for context in shown[0].state:
        values = [p.state[context] for p in shown]
        rows.append((f"state at {context:,} tokens", values, size))
    heads = "".join(f'<th class="n" scope="col">{escape(p.name)}</th>' for p in shown)
    two = len(shown) > 1
    ratio = '<th class="n" scope="col">ratio</th>' if two else ""
    lines = []
    for label, values, write in rows:
        cells = "".join(f'<td class="n">{escape(write(v))}</td>' for v in values)
        if two:
            part = f"{values[1] / values[0]:.3f}" if values[0] else "-"
            cells += f'<td class="n">{part}</td>'
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    head = f"<thead><tr><td></td>{heads}{ratio}</tr></thead>" if two else ""
    return f'<table class="facts">{head}<tbody>{"".join(lines)}</tbody></table>'


def _program(picture: Picture, key: str, tallest: int, with_name: bool) -> Iterator[str]:
    if with_name:
        yield f"<h2>{escape(picture.name)}</h2>"
    names = ["capture" if s.name.startswith("capture ") else s.name for s in picture.stages]
    links = "".join(
        f'<li><a href="#{key}-{i}">{escape(n if len(n) < 40 else f"{n[:39]}…")}</a></li>'
        for i, n in enumerate(names)
    )
    yield f'<ol class="chain" aria-label="stages">{links}</ol>'
    yield f'<div class="ends">{escape(", ".join(picture.inputs))}</div>'
    for part in picture.parts:
        yield from (
            _loop(part, tallest, with_name) if isinstance(part, LoopPicture) else _region(part)
        )
    yield f'<div class="ends">{escape(", ".join(picture.outputs))}</div>'
    yield '<h2>Stages</h2><ol class="stages">'
    for i, stage in enumerate(picture.stages):
        yield f'<li id="{key}-{i}">{"".join(_stage(stage))}</li>'
    yield "</ol>"


# ---- the graph


def _region(region: RegionPicture) -> Iterator[str]:
    names = dict.fromkeys(line.op for line in region.lines if not line.minor)
    brief = ", ".join(names) or "other forms of values"
    brief = brief if len(brief) < 64 else f"{brief[:63]}…"
    count = f"{len(region.lines)} ops" if len(region.lines) > 1 else "1 op"
    yield '<details class="box region"><summary>'
    yield f"<b>{count}</b>: {escape(brief)}"
    mixed = in_turn((m.what for m in region.mixings), ", ")
    words = [mixed] if mixed else []
    if region.parameters:
        words.append(f"{region.parameters:,} parameters")
    words += [f"state {size(v)} at {c:,} tokens" for c, v in region.state.items() if v]
    if words:
        yield f' <span class="weigh">· {escape(", ".join(words))}</span>'
    yield f"</summary>{_lines(region.lines)}</details>"


def _loop(loop: LoopPicture, tallest: int, beside: bool) -> Iterator[str]:
    period = f" × {loop.period} layers" if loop.period > 1 else ""
    yield '<section class="box loop"><header>'
    yield f"<h3>{escape(loop.name)}</h3>"
    yield f'<span class="times">↻ {len(loop.trips)} trips{period}</span></header>'
    yield f'<p class="note">{loop.parameters:,} parameters, {size(loop.bytes)} stored. '
    yield f"Carries {escape(', '.join(loop.carry))}.</p>"
    yield lanes(loop, tallest)
    yield '<details class="more" open><summary>The ops of one trip</summary>'
    yield f"{_lines(loop.body)}</details>"
    if loop.inputs:
        inputs = escape("; ".join(loop.inputs))
        yield f'<p class="note">All trips are given {inputs}.</p>'
    shown = "" if beside else " open"
    yield f'<details class="more"{shown}><summary>Numbers by trip</summary>'
    yield f"{scroll(_numbers(loop), f'numbers of {loop.name} by trip')}</details></section>"


def _lines(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        weights = ", ".join(f'<span class="weight">{escape(w)}</span>' for w in line.weights)
        note = f" {escape(line.note)}" if line.note else ""
        about = " · ".join(t for t in (f"{weights}{note}", escape(line.operands)) if t)
        css_class = ' class="minor"' if line.minor else ""
        rows.append(
            f'<tr{css_class} title="{escape(line.text)}">'
            f'<td class="n">{escape(line.result)}</td><td>{escape(line.op)}</td><td>{about}</td>'
            f"<td>{escape(line.type)}</td></tr>"
        )
    heads = '<th class="n">result</th><th>op</th><th>weights · operands</th><th>type</th>'
    head = f"<thead><tr>{heads}</tr></thead>"
    return scroll(f'<table class="ops">{head}<tbody>{"".join(rows)}</tbody></table>', "ops")


def _numbers(loop: LoopPicture) -> str:
    """The table with a row for each trip."""
    shared = next((s for s in loop.sharing if s.is_shared), None)
    exits = {e.after - 1: e for e in loop.exits}
    contexts = list(loop.state)
    ranks: dict[tuple[int, ...], list[str]] = {}
    for residual in loop.residuals:
        ranks.setdefault(residual.ranks, []).append(residual.weight.rpartition(".")[2])
    heads = ["trip", "layer", "block", "parameters read", "bytes read"]
    heads += [f"state at {c:,}" for c in contexts]
    heads += [f"rank of {names[0] if len(ranks) > 1 else 'residuals'}" for names in ranks.values()]
    left = ["mixes tokens by", *(["exit after it"] if exits else [])]
    head = "".join(f'<th class="n" scope="col">{escape(h)}</th>' for h in heads)
    head += "".join(f'<th scope="col">{escape(h)}</th>' for h in left)
    rows = []
    for trip in loop.trips:
        block = shared.index[trip.number] if shared else None
        values = [
            str(trip.number),
            ", ".join(map(str, trip.layers)) or "-",
            "own" if block is None else str(block),
            number(trip.parameters),
            size(trip.bytes),
            *(size(trip.state[c]) for c in contexts),
            *(str(each[trip.number]) for each in ranks),
        ]
        cells = "".join(f'<td class="n">{escape(v)}</td>' for v in values)
        cells += f"<td>{escape(mixed(trip))}</td>"
        if exits:
            exit_ = exits.get(trip.number)
            cells += f"<td>{escape(threshold(exit_) if exit_ else '')}</td>"
        rows.append(f"<tr>{cells}</tr>")
    body = "".join(rows)
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


# ---- stages


def _stage(stage: Stage) -> Iterator[str]:
    seconds = "" if stage.seconds is None else f" <small>{stage.seconds:.1f} s</small>"
    yield f"<h3>{escape(stage.name)}{seconds}</h3>"
    if stage.remarks:
        yield "<ul>" + "".join(f"<li>{escape(r)}</li>" for r in stage.remarks) + "</ul>"
    if stage.changes:
        rows = "".join(_change(change) for change in stage.changes)
        head = '<th></th><th class="n">before</th><th class="n">after</th>'
        table = (
            f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        )
        yield scroll(table, f"what {stage.name} changed")


def _change(change: Change) -> str:
    cells = "".join(
        f'<td class="n">{escape("" if v is None else _value(v, change.unit))}</td>'
        for v in (change.before, change.after)
    )
    return f'<tr><th scope="row">{escape(change.label)}</th>{cells}</tr>'


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    return f"{100 * value:.1f} %" if unit == "share" else number(value)


# ---- the trips of a loop as columns


# columns are as wide as there is room for, within these
NARROWEST, ROOM = 18, 520
LETTER = 6.4

LANES_STYLE = """
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
        *_residual_lanes(loop),
        *_mixings(loop.trips),
        *_exit_lanes(loop.exits),
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
    for place, each in enumerate(unshared):
        if shared or place:
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


def _residual_lanes(loop: LoopPicture) -> Iterator[str]:
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


def _exit_lanes(exits: Sequence[Exit]) -> Iterator[str]:
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
