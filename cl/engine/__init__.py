"""Training, step by step: the learner, the contracts of strategies and instruments, the experiment, checkpoints."""
