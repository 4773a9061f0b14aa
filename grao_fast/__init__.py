"""grao-fast: Group Relative Alignment Optimization (arXiv 2508.07750) for language models.

Exports are imported on first use (PEP 562): `import grao_fast` and `import grao_fast.kernels` load
neither transformers nor the trainer, so that other programs can use the kernels alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grao_fast.checkup.findings import Finding
    from grao_fast.checkup.result import CheckResult
    from grao_fast.checkup.run import check
    from grao_fast.config import GRAOConfig
    from grao_fast.data import Example, load_examples
    from grao_fast.evaluation.compare import evaluate_completions
    from grao_fast.evaluation.evaluate import evaluate
    from grao_fast.evaluation.result import EvaluationResult
    from grao_fast.reporting.page.report import report
    from grao_fast.reporting.plots import plot_run
    from grao_fast.system.interruption import Preempted
    from grao_fast.trainer import train
    from grao_fast.training.results import TrainResult

__version__ = "0.1.0"

__all__ = [
    "CheckResult",
    "EvaluationResult",
    "Example",
    "Finding",
    "GRAOConfig",
    "Preempted",
    "TrainResult",
    "__version__",
    "check",
    "evaluate",
    "evaluate_completions",
    "load_examples",
    "plot_run",
    "report",
    "train",
]

_MODULE_OF = {
    "CheckResult": "checkup.result",
    "EvaluationResult": "evaluation.result",
    "Example": "data",
    "Finding": "checkup.findings",
    "GRAOConfig": "config",
    "Preempted": "system.interruption",
    "TrainResult": "training.results",
    "check": "checkup.run",
    "evaluate": "evaluation.evaluate",
    "evaluate_completions": "evaluation.compare",
    "load_examples": "data",
    "plot_run": "reporting.plots",
    "report": "reporting.page.report",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
