"""Who learns, step by step: the learner, its contracts with strategies and instruments, the experiment, checkpoints."""
