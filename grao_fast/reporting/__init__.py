"""Reporting: trackers, tables, plots, the console."""
