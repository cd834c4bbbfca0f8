"""The edges of a process: errors, files, images, logs, checkpoints, ranks, signals, progress."""
