"""The errors of docs/integrations.md, by which tests check those that they measure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tolerance import worst_error
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
_LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
_FIGURE = re.compile(r"\d\.\de-\d\d")


def assert_as_published(
    way: str,
    value: float | Tensor,
    true_value: float | Tensor,
    gradients: Iterable[Tensor],
    true_gradients: Iterable[Tensor],
    *,
    kind: str = "",
) -> None:
    """Check how far a loss and its gradients are from the float64 truth by the published errors.

    way: the row of docs/integrations.md. kind: which of several with that row, to be printed.
    """
    gradients = list(gradients)
    assert_errors_as_published(
        way,
        loss=abs(float(value) / float(true_value) - 1),
        gradient=worst_error(gradients, true_gradients),
        eps=torch.finfo(gradients[0].dtype).eps,
        kind=kind,
    )


def assert_errors_as_published(
    way: str, *, gradient: float, loss: float | None = None, eps: float, kind: str = ""
) -> None:
    """Print errors, for `pytest -s`, and check them by those of a row of docs/integrations.md.

    Another processor rounds otherwise, so an error may be four times that of the page; one of a few
    units in the last place is a matter of luck, so it may always be as large as four of them.
    """
    measured = {"loss": loss, "gradient": gradient}
    known = published_errors()[way]
    for what, error in measured.items():
        assert (error is None) == (known[what] is None), f"{way}: {what} is published, or not"
        if error is not None:
            print(f"\n{way}{kind and f' ({kind})'}: the {what} is off by {error:.1e}", end="")
            allowed = 4 * max(known[what], eps)
            assert error <= allowed, (
                f"{way}: the {what} is off by {error:.1e}, more than {allowed:.1e}: find out why, "
                f"or correct the {known[what]:.1e} of docs/integrations.md"
            )


def published_errors() -> dict[str, dict[str, float | None]]:
    """The errors of loss and gradient of each way in docs/integrations.md, by its plain name."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    return {
        _LINK.sub(r"\1", row[0]).replace("`", ""): {
            "loss": None if row[1] == "not compared" else float(row[1]),
            "gradient": float(row[2]),
        }
        for row in rows
        if len(row) == 4 and _FIGURE.fullmatch(row[2])
    }
