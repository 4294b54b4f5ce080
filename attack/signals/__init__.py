"""Per-image signals: what an averaged gradient says of every single image, read before the attack."""

from attack.signals.recovery import Signals, recover_signals

__all__ = ["Signals", "recover_signals"]
