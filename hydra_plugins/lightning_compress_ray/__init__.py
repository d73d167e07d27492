"""A launcher of jobs as Ray tasks."""
