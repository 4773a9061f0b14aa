"""docs/integrations.md: every error has a test, and a test fails where an error is far above it."""

from __future__ import annotations

import re

import pytest
from published import PAGE, assert_errors_as_published, published_errors

EPS = 2.0**-23
WAY = "TRL, GRAOTrainer"


def test_every_row_has_a_test_that_checks_it() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.search(r"\| \d\.\de-\d\d \|", line)]
    ways = published_errors()
    assert len(rows) == len(ways) > 8
    for way, row in zip(ways, rows, strict=True):
        (file,) = re.findall(r"`tests/(test_\w+\.py)", row)
        assert way in PAGE.parents[1].joinpath("tests", file).read_text(encoding="utf-8"), way


def test_errors_far_above_the_page_are_refused() -> None:
    known = published_errors()[WAY]
    assert_errors_as_published(WAY, loss=4 * EPS, gradient=4 * known["gradient"], eps=EPS)
    for loss, gradient in ((4.1 * EPS, 0.0), (0.0, 4.1 * known["gradient"])):
        with pytest.raises(AssertionError, match=r"more than .*: find out why, or correct the"):
            assert_errors_as_published(WAY, loss=loss, gradient=gradient, eps=EPS)
    with pytest.raises(AssertionError, match="loss is published, or not"):
        assert_errors_as_published(WAY, gradient=0.0, eps=EPS)
