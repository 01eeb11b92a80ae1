"""The page on which a Program is seen, alone or beside another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from reroll.evaluate import trip_lanes
from reroll.evaluate.pages import document, escape, number, scroll, size
from reroll.evaluate.picture import Change, Line, LoopPicture, Picture, RegionPicture, Stage

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
    return document(title, [*parts, "</main>"], STYLE + trip_lanes.STYLE)


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
    links = "".join(
        f'<li><a href="#{key}-{i}">{escape(_brief(stage.name))}</a></li>'
        for i, stage in enumerate(picture.stages)
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


def _brief(name: str) -> str:
    if name.startswith("capture "):
        return "capture"
    return name if len(name) < 40 else f"{name[:39]}…"


# ---- the graph


def _region(region: RegionPicture) -> Iterator[str]:
    names = dict.fromkeys(line.op for line in region.lines if not line.minor)
    brief = ", ".join(names) or "other forms of values"
    brief = brief if len(brief) < 64 else f"{brief[:63]}…"
    count = f"{len(region.lines)} ops" if len(region.lines) > 1 else "1 op"
    yield '<details class="box region"><summary>'
    yield f"<b>{count}</b>: {escape(brief)}"
    mixed = trip_lanes.in_turn((m.what for m in region.mixings), ", ")
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
    yield trip_lanes.lanes(loop, tallest)
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
        cells += f"<td>{escape(trip_lanes.mixed(trip))}</td>"
        if exits:
            exit_ = exits.get(trip.number)
            cells += f"<td>{escape(trip_lanes.threshold(exit_) if exit_ else '')}</td>"
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
