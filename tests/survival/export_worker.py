"""An export without torch and without a model: `python -m tests.survival.export_worker DIRECTORY LOCK TOKEN TEXT`.

The lock, the hidden directory and its publication are the product's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft_core.export.output import staged
from peft_core.export.request import MANIFEST_NAME
from peft_core.system.lock import FileLock

if __name__ == "__main__":
    directory, lock, token, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    with FileLock(lock) as held:
        assert held.acquire(), "the lock of a dead export is still held"
        with staged(directory, token, overwrite=True) as staging:
            (staging / "model.gguf").write_text(text)
            files = [{"path": "model.gguf", "bytes": len(text), "sha256": ""}]
            manifest = {"to": "merged", "format": "f16", "adapter_id": text, "files": files}
            (staging / MANIFEST_NAME).write_text(json.dumps(manifest))
