"""Lightning's Trainer: the arguments that a user may set, and the processes of a run."""
