"""Processes of a run: what they exchange, and how they divide a model."""
