"""The part of an evaluation that needs torch: it runs in a worker process."""
