"""Using adapters: a child process that holds base and adapters in memory (host/), and this process's end of it."""
