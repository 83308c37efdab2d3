"""What is learned: datasets, how they are read, and tasks and streams of them."""
