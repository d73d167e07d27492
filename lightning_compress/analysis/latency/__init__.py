"""What a model and its layers take on the target: devices, their table, and predictions from it."""
