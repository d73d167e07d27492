"""What knows no layer: settings, the plan, errors, processes and threads."""
