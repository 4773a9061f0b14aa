"""Write word problems in arithmetic, with worked solutions as references, from a seed.

    python examples/math/problems.py --output problems

makes problems/train.jsonl and problems/test.jsonl, which share no problem. They are generated, and
in the public domain.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = ("Amara", "Ben", "Chloe", "Dmitri", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas")
THINGS = ("apples", "books", "candles", "marbles", "pencils", "shells", "stamps", "tickets")
Problem = tuple[str, str, int]  # question, solution, answer


def gained(draw: random.Random, name: str, thing: str) -> Problem:
    """Some are added."""
    a, b = draw.randint(5, 60), draw.randint(5, 40)
    question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
    return question, f"{a} + {b} = {a + b}.", a + b


def lost(draw: random.Random, name: str, thing: str) -> Problem:
    """Some are taken away."""
    a = draw.randint(20, 90)
    b = draw.randint(3, a - 1)
    question = f"{name} had {a} {thing} and gave away {b}. How many {thing} are left?"
    return question, f"{a} - {b} = {a - b}.", a - b


def boxes(draw: random.Random, name: str, thing: str) -> Problem:
    """Equal boxes, and a few that are not in one."""
    n, each, loose = draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 9)
    question = (
        f"{name} has {n} boxes of {each} {thing} each, and {loose} loose {thing}. "
        f"How many {thing} are there in all?"
    )
    total = n * each + loose
    return question, f"{n} * {each} = {n * each}, and {n * each} + {loose} = {total}.", total


def shared(draw: random.Random, name: str, thing: str) -> Problem:
    """Shared by friends, one of whom spends some."""
    friends, each = draw.randint(2, 8), draw.randint(6, 15)
    spent = draw.randint(1, each - 1)
    question = (
        f"{friends} friends share {friends * each} {thing} equally. {name}, one of them, then "
        f"gives {spent} away. How many {thing} does {name} have left?"
    )
    left = each - spent
    return question, f"{friends * each} / {friends} = {each}, and {each} - {spent} = {left}.", left


KINDS: tuple[Callable[[random.Random, str, str], Problem], ...] = (gained, lost, boxes, shared)


def problems(number: int, *, seed: int) -> list[dict]:
    """Return rows with `prompt`, `reference` and `answer`; no question occurs twice."""
    draw = random.Random(seed)
    rows: dict[str, dict] = {}
    while len(rows) < number:
        kind = draw.choice(KINDS)
        question, solution, answer = kind(draw, draw.choice(NAMES), draw.choice(THINGS))
        rows[question] = {
            "prompt": [{"role": "user", "content": question}],
            "reference": f"{solution} The answer is {answer}.",
            "answer": str(answer),
        }
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("problems"))
    parser.add_argument("--train", type=int, default=1000, help="number of rows")
    parser.add_argument("--test", type=int, default=100, help="number of held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rows = problems(arguments.train + arguments.test, seed=arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[: arguments.train], "test": rows[arguments.train :]}
    for name, part in parts.items():
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{path}: {len(part)} problems")


if __name__ == "__main__":
    main()
