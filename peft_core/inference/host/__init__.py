"""The inference process. Imports torch; only ever started as `python -m peft_core.inference.host`."""
