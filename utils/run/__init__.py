"""What a run keeps: log, preemption, optimisation, checkpoint, progress, metrics."""
