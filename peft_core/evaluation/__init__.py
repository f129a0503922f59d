"""Evaluate whether an adapter helps: scores of base model and adapter, confidence intervals, verdict, report, loss curve."""
