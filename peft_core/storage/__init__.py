"""What is kept below the data directory: list it, and free what the user names."""
