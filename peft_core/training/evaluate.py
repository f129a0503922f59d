"""Loss on held-out examples."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from peft_core.compute.process import return_surplus_memory
from peft_core.compute.stop import Stop
from peft_core.errors import NotFinite
from peft_core.training.batches import Document
from peft_core.training.objective import Objective

_DURING_TRAINING_TOKENS = 8192


def held_out_loss(objective: Objective, documents: Sequence[Document], accelerator: Accelerator, stop: Stop) -> float:
    """Mean over all target tokens of -log p, nats. Each process takes its share of the documents.

    Raises:
        NotFinite: the loss.
        Stopped: on request; only where there is one process, as others would wait for this one.
    """
    share = sorted(documents, key=len, reverse=True)[accelerator.process_index :: accelerator.num_processes]
    was_training = objective.model.training
    objective.model.eval()
    total = torch.zeros((), device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in objective.batches(share, accelerator.device):
            total += objective.loss(batch)
            return_surplus_memory()
            if accelerator.num_processes == 1:
                stop.check()
    objective.model.train(was_training)
    total = accelerator.reduce(total, reduction="sum")
    loss = float(total.item()) / sum(document.targets for document in documents)
    if not abs(loss) < float("inf"):
        raise NotFinite(
            f"the loss on the held-out examples is {loss}",
            suggestions=["Lower learning_rate.", "Try device='cpu', which computes in float32."],
        )
    return loss


def subset(documents: Sequence[Document], seed: int) -> list[Document]:
    """A fixed random subset that is quick enough to measure during training: about 8k tokens."""
    shuffled = list(documents)
    random.Random(f"held-out/{seed}").shuffle(shuffled)  # noqa: S311 -- a sample, not a secret
    chosen: list[Document] = []
    room = _DURING_TRAINING_TOKENS
    for document in shuffled:
        if chosen and len(document) > room:
            break
        chosen.append(document)
        room -= len(document)
    return chosen
