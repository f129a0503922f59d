"""llama.cpp: the files that it reads, and the runtime itself, which is optional."""
