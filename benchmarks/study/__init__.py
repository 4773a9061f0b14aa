"""The paper's comparison, small: methods that start from one base model, on four tasks."""
