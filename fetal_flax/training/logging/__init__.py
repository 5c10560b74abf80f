"""What listens to a run: the terminal, log files, the profiler."""
