"""The inference process. Imports torch; started as `python -m peft_core.inference.worker`."""
