"""Build the questions of the measure `recall`, each with the distance of its answer.

Seed, task, cell and number of a sample determine its question. Parts are tokenized one by one and
concatenated, so that a context has exactly the requested length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from reroll.evaluate.answers import Answer, Question, ScoredRow, Spot, encode, score_rows
from reroll.evaluate.measure import Bench, NotApplicable
from reroll.evaluate.runner import Runner
from reroll.evaluate.tokenizing import plain_ids

# no two begin with the same letter, so their first tokens differ with every tokenizer
WORDS = (
    "apple bridge candle dragon engine forest garden hammer island jacket kitchen lemon mountain "
    "needle orange piano"
).split()
FIRST = "Anna Boris Clara David Elena Frank Greta Henry Irene Jonas Karla Louis Maria Nora".split()
LAST = (
    "Adams Baker Carter Dalton Ellis Fisher Graham Harper Irving Jensen Keller Lambert Morgan "
    "Norris Osborn Parker Quinn Reeves Sawyer Turner Ulrich Vaughn Walker Young"
).split()
FILLER = (
    "The road goes up the hill and down again. It was a day like any other. "
    "Nothing was to be seen but fields. The wind came and went.\n"
)
KEYS = 10
SHOTS = 2


def needle(
    bench: Bench, runner: Runner, length: int, depth: float, sample: int
) -> tuple[Question, int] | None:
    """Build a question for a secret word in the text; None if the length has no room for it."""
    random = bench.random("needle", length, depth, sample)
    name = f"{random.choice(FIRST)} {random.choice(LAST)}"
    words = random.sample(WORDS, len(WORDS))
    said = f"\nThe secret word of {name} is"
    hay = plain_ids(runner.tokenizer, bench.text)
    offset = random.randrange(len(hay))
    return _hidden(runner, length, depth, hay, offset, said, ".\n", [f" {w}" for w in words])


def passkey(
    bench: Bench, runner: Runner, length: int, depth: float, sample: int
) -> tuple[Question, int] | None:
    """Build a question for five digits in filler; None if the length has no room for them."""
    random = bench.random("passkey", length, depth, sample)
    # no two keys begin with the same digit
    starts = random.sample(range(KEYS), KEYS)
    keys = [f"{d}{random.randrange(10**4):04}" for d in starts]
    said = "\nThe pass key is"
    hay = plain_ids(runner.tokenizer, FILLER)
    return _hidden(runner, length, depth, hay, 0, said, ". Remember it.\n", [f" {k}" for k in keys])


def _hidden(
    runner: Runner,
    length: int,
    depth: float,
    hay: list[int],
    offset: int,
    sentence: str,
    closing: str,
    candidates: list[str],
) -> tuple[Question, int] | None:
    """Build a question whose first candidate is stated at a depth of the filler `hay`.

    Prompt and answer have `length` tokens. None if that is too short.
    """
    question = encode(runner, sentence, candidates, 0)
    asking = question.prompt[len(runner.prefix) :]
    answer = question.candidates[0]
    needle = asking + answer + plain_ids(runner.tokenizer, closing)
    fixed = len(runner.prefix) + len(needle) + len(asking) + len(answer)
    room = length - fixed
    if room < 0:
        return None
    filler = [hay[(offset + n) % len(hay)] for n in range(room)]
    position = round(depth * room)
    before = runner.prefix + filler[:position]
    prompt = before + needle + filler[position:] + asking
    distance = len(prompt) - 1 - (len(before) + len(asking))
    return Question(prompt, question.candidates, 0), distance


def phonebook(bench: Bench, runner: Runner, entries: int, sample: int) -> tuple[Question, int]:
    """Build a book of names and numbers, two of its lines as examples, and one other name."""
    random = bench.random("phonebook", entries, sample)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    if entries > len(names):
        raise NotApplicable(f"a phone book has {len(names)} names at most, not {entries}")
    chosen = random.sample(names, entries)
    numbers = [f"{random.randrange(10**4):04}" for _ in chosen]
    wanted = random.randrange(entries)
    # candidates are numbers of the book that begin differently
    candidates = {numbers[wanted][0]: numbers[wanted]}
    for number in random.sample(numbers, entries):
        candidates.setdefault(number[0], number)
    head = plain_ids(runner.tokenizer, "Phone book\n")
    question = encode(runner, f"{chosen[wanted]}:", [f" {n}" for n in candidates.values()], 0)
    asking = question.prompt[len(runner.prefix) :]
    ids = runner.prefix + head
    entry_end = 0
    for entry, (name, digits) in enumerate(zip(chosen, numbers, strict=True)):
        if entry == wanted:
            entry_end = len(ids) + len(asking)
            line = asking + question.candidates[0] + plain_ids(runner.tokenizer, "\n")
        else:
            line = plain_ids(runner.tokenizer, f"{name}: {digits}\n")
        ids += line
    others = [n for n in range(entries) if n != wanted]
    again = "".join(
        f"{chosen[n]}: {numbers[n]}\n" for n in random.sample(others, min(SHOTS, len(others)))
    )
    prompt = ids + plain_ids(runner.tokenizer, f"\nLooked up\n{again}") + asking
    return Question(prompt, question.candidates, 0), len(prompt) - 1 - entry_end


def mqar(bench: Bench, runner: Runner, pairs: int, samples: int) -> Iterator[tuple[Answer, int]]:
    """Yield the answers to every query of some rows of pairs, with distances; none if too long."""
    words = _words(runner)
    # every pair occurs twice
    if runner.limit and len(runner.prefix) + 4 * pairs > runner.limit:
        return
    if len(words) < 2 * pairs:
        raise NotApplicable(f"the tokenizer has {len(words)} words, too few for {pairs} pairs")
    rows, distances = [], []
    for sample in range(samples):
        row, away = _pairs(bench.random("mqar", pairs, sample), runner.prefix, words, pairs)
        rows.append(row)
        distances.append(away)
    for scores, away in zip(score_rows(runner, rows), distances, strict=True):
        yield from zip(scores, away, strict=True)


def _pairs(
    random: random.Random, prefix: list[int], words: list[int], pairs: int
) -> tuple[ScoredRow, list[int]]:
    chosen = random.sample(words, 2 * pairs)
    keys, values = chosen[:pairs], chosen[pairs:]
    ids = [*prefix, *(i for pair in zip(keys, values, strict=True) for i in pair)]
    spots, distances = [], []
    for number in random.sample(range(pairs), pairs):
        ids += [keys[number], values[number]]
        said = len(prefix) + 2 * number + 1
        spots.append(Spot(len(ids) - 2, values[number], tuple(values)))
        distances.append(len(ids) - 2 - said)
    return ScoredRow(ids, spots), distances


def _words(runner: Runner) -> list[int]:
    """Return tokens that are plain words, or at least printable, in the order of their ids."""
    tokenizer = runner.tokenizer
    special = set(tokenizer.all_special_ids)
    count = min(len(tokenizer), runner.vocabulary)
    texts = {i: tokenizer.decode([i]) for i in range(min(count, 20_000)) if i not in special}
    for wanted in (lambda t: t[:1] == " " and t[1:].isalpha() and len(t) > 3, str.isprintable):
        words = [i for i, text in texts.items() if text.isascii() and wanted(text)]
        if len(words) >= 512:
            break
    return words
