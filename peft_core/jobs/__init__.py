"""Jobs: their state and store, and the processes that run them. `service.py` is the entry point."""
