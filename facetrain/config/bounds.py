"""Bounds of single settings."""


def at_least(key: str, value: float, bound: float) -> None:
    """Raise ValueError, naming the key, where the value is below the bound."""
    if value < bound:
        raise ValueError(f"{key}: expected {bound} or more, got {value}")


def more_than_0(key: str, value: float) -> None:
    """Raise ValueError, naming the key, where the value isn't positive."""
    if not value > 0:
        raise ValueError(f"{key}: expected more than 0, got {value}")
