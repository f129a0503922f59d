"""The endpoint's process: OpenAI's and llama.cpp's HTTP interfaces to the adapters, for editors and scripts on this machine."""
