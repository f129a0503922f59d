"""What runs in child processes: writing GGUF files imports numpy, and a broken file can crash llama.cpp."""
