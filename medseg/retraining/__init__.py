"""Retraining with proof: a model is promoted only if a rule that was declared before says so, and can be taken back.

    settings ─► job (what is new? does the gate leak?) ─► tick: train ─► score champion and challenger on the gate
                                                              │
        rule: checks with numbers ◄───────────────────────────┘
          │
          └─► decisions.jsonl (hash-chained, append-only) ─► aliases champion / previous / challenger

The decision is written before the aliases move: a command that dies between the two is completed by the next one.
The tick itself is medseg.retraining.tick.retrain; it stands apart because it needs torch.
"""

from medseg.retraining.decisions import Decision, read_decisions
from medseg.retraining.promotion import promote_version, roll_back
from medseg.retraining.result import RetrainResult

__all__ = ["Decision", "RetrainResult", "promote_version", "read_decisions", "roll_back"]
