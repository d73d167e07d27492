"""What looks at a model and never changes it."""
