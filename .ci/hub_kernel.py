"""Writes the kernels as a package for the hub of Hugging Face's `kernels`.

    python .ci/hub_kernel.py FOLDER

FOLDER gets a model card and `build/torch-universal`, with the modules of `kernels/` and the
metadata that the `kernels` library reads. `kernels.get_local_kernel(FOLDER)` loads it, and
`kernels upload FOLDER --repo-id ...` publishes it. The package needs PyTorch and Triton alone, and
may be loaded beside an installed grao-fast: its name, which holds a hash of the modules, is the
namespace of its operators.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = 1  # of the package's interface on the hub; raised where a change breaks callers

CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, triton, reinforcement-learning]
---

# grao-fast

Losses of a language model's head in one pass over the vocabulary, without the logits in memory:
GRAO (arXiv 2508.07750), any loss that is linear in token log-probabilities or in clipped ratios of
them, and differentiable log-probabilities. Triton on GPUs, PyTorch on CPUs.

```python
from kernels import get_kernel

grao = get_kernel("YOUR-NAME/grao-fast", version={version})
loss = grao.linear_grao_loss(hidden_TD, head_VD, target_T, sequence_T, rewards_NK).loss
```

Public functions: {names}.
"""


def write_package(folder: Path) -> Path:
    """Write the package into a folder that does not exist or is empty; returns its variant's path.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    variant = folder / "build" / "torch-universal"
    shutil.copytree(ROOT / "kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = {
        "id": f"_grao_fast_{_digest(variant)}",
        "name": "grao-fast",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    card = CARD.format(version=VERSION, names=", ".join(f"`{name}`" for name in _public_names()))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return variant


def _digest(folder: Path) -> str:
    """The first digits of a hash of all modules and their paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _public_names() -> list[str]:
    from grao_fast import kernels

    return list(kernels.__all__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(write_package(parser.parse_args().folder))


if __name__ == "__main__":
    main()
