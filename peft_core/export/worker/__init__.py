"""The export worker: converts, and compares what it wrote with PEFT. Runs in a child process."""
