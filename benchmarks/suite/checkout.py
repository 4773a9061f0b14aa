"""Makes `grao_fast`, with its kernels, mean this checkout, installed or not."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout(folder: Path) -> str:
    """Make `import grao_fast.kernels` find this checkout from here on; return how.

    That is so already where the checkout is installed in development mode. Anywhere else `folder`,
    which must be empty and must outlive the imports, gets a package of links, laid out as an
    install would: `kernels/` lies beside `grao_fast/` here and inside it there. It goes on the
    path of this process and of those it starts.
    """
    if _origin("grao_fast.kernels") == ROOT / "kernels" / "__init__.py":
        return "development install"
    for name in [each for each in sys.modules if each.split(".")[0] == "grao_fast"]:
        del sys.modules[name]
    package = folder / "grao_fast"
    package.mkdir()
    for entry in (ROOT / "grao_fast").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    sys.path.insert(0, str(folder))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    importlib.invalidate_caches()
    return "bare checkout"


def _origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()
