"""The Python API in ten lines: train on the directory given, print what was measured.

Five steps show that it works; leave `max_steps` out for a real run.
"""

import sys

import anyio

from peft_core import PEFTManager


async def main(directory: str) -> None:
    manager = PEFTManager()
    job = await manager.train_adapter("example", directory, {"max_steps": 5})
    async for status in manager.watch_training("example", job.job_id):
        print(f"{status.progress_percent:5.1f} %  {status.status}  step {status.step}  loss {status.loss}")
    print(status.error or await manager.get_adapter_info("example"))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
