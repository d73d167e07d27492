"""What happens between the swap and the end of the fit: optimizers, schedule, distillation."""
