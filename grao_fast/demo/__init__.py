"""`grao-fast demo`: a tiny model, pretrained on flawed references and aligned past them by GRAO."""

from __future__ import annotations

from grao_fast.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
