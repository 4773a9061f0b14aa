"""The demo: a tiny model is pretrained on flawed references, and GRAO trains it to beat them."""

from __future__ import annotations

from grao_fast.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
