"""Reporting: metrics files, the console, tables, plots, and experiment trackers."""
