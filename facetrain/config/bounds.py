"""Bounds of single settings."""


def at_least(key: str, value: float, bound: float) -> None:
    """Raise ValueError, naming the key, where the value is below the bound."""
    if value < bound:
        raise ValueError(f"{key}: expected {bound} or more, got {value}")
