"""Start, find and stop the endpoint, which is a process of its own and outlives the server that started it."""
