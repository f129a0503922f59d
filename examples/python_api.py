"""The Python API on one page: train on the given directory, print the measurements, use the adapter.

Three short steps, measured on little code, show that it works; omit QUICK for a real run.
"""

import sys

import anyio

from peft_core import PEFTManager

# continue_from="none": each run trains from scratch. Without it, the second one learns only what has changed since the first.
QUICK = {"max_steps": 3, "max_length": 128, "held_out_fraction": 0.02, "continue_from": "none"}


async def main(directory: str) -> None:
    async with PEFTManager() as manager:  # leaving the block unloads the model; jobs keep running
        job = await manager.train_adapter("example", directory, QUICK)
        async for status in manager.watch_training("example", job.job_id):
            print(f"{status.progress_percent:5.1f} %  {status.status}  step {status.step}  loss {status.loss}")
        if status.error:
            sys.exit(status.error.message)
        print(await manager.get_adapter_info("example"))

        loaded = await manager.load_adapter(str(status.adapter_path))
        print(f"{loaded.status} on {loaded.base_model}: {loaded.reason or loaded.effect}")
        generation = await manager.generate({"prompt": "def main(", "max_new_tokens": 40, "compare_with_base": True})
        print(f"--- with the adapter\n{generation.text}\n--- base model\n{generation.base_text}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
