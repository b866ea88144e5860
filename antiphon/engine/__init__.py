"""The realtime engine: many conversations at once, each as `generate.py` would hold it alone."""

from antiphon.engine.call import Answering, Call, Failed
from antiphon.engine.engine import Engine

__all__ = ["Answering", "Call", "Engine", "Failed"]
