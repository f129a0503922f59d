"""The process that trains or evaluates; started as `python -m peft_core.worker`."""
