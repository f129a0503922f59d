"""Training on a Ray cluster: the bridge on this machine, the coordinator on the head node, the run on another node.

    runner ── bridge ──(Ray)── coordinator ── remote run ── peft_core.worker
              here             head node      the node that Ray chose

A run is the same worker with the same task as here; `bridge.py` describes the contract. Ray itself serialises calls and
results with pickle, so this machine and the cluster must trust each other: who controls one can run code on the other.
"""
