"""Networks, data modules and the task of the command `lightning-compress` and the examples."""
