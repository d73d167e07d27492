"""From a model and a budget to a plan."""
