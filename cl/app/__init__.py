"""From a command line or a script to an experiment: compose, check and build a configuration, and run its jobs."""
