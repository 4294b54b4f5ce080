"""Per-image signals: what an averaged gradient says of every single image, read before the attack."""

from attack.signals.engine import Reading, read_layers
from attack.signals.recovery import Signals, recover_signals

__all__ = ["Reading", "Signals", "read_layers", "recover_signals"]
