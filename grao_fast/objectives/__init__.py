"""Objectives: from rewards, references and lengths to the loss of a micro-batch."""
