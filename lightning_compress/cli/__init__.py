"""The Hydra application, its reports and its demonstration."""
