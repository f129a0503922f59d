"""Services of the operating system, without torch: child processes, files, locks, logs, memory, devices, allowed paths."""
