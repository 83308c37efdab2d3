"""Lightning's Trainer: the arguments that a run lets a user set, and the processes that it runs in."""
