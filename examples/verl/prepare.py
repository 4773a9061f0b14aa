"""Writes sums with reference answers as parquet files that verl reads: `prepare.py [FOLDER]`."""

import random
import sys
from pathlib import Path

from datasets import Dataset


def rows(count: int, *, seed: int) -> list[dict]:
    """Questions with references; every third reference is wrong, as references in the wild are."""
    generator = random.Random(seed)
    made = []
    for i in range(count):
        a, b = generator.randrange(10, 100), generator.randrange(10, 100)
        shown = a + b + (1 if i % 3 == 0 else 0)
        made.append(
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
                "reference": f"{a} + {b} = {shown}",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"index": i},
            }
        )
    return made


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "sums")
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows(2000, seed=0)).to_parquet(folder / "train.parquet")
    Dataset.from_list(rows(200, seed=1)).to_parquet(folder / "test.parquet")
