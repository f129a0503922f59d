"""What the operating system gives us: child processes, files, locks, logs, memory and devices. No torch."""
