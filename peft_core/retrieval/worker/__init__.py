"""The index over code units, in the processes that hold models."""
