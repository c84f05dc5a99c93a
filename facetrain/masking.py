"""Masking: passwords and tokens that a setting may hold stay out of logs and tracking servers."""

import re

_NAMES = r"[\w-]*(?:token|password|passwd|secret|api[_-]?key|access[_-]?key|signature|credential)[\w-]*"
_PATTERNS = (
    (re.compile(r"(?<=://)[^/@\s]+(?=@)"), "***"),  # https://user:password@host
    (
        re.compile(rf"\b({_NAMES}['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;]+", re.IGNORECASE),
        r"\1***",
    ),  # ?token=..., secret: ...
    (re.compile(r"([?&](?:sig|key)=)[^\s&'\"]+", re.IGNORECASE), r"\1***"),  # Azure's and Google's signed URLs
    (
        re.compile(r"\b(bearer\s+|authorization:\s*basic\s+)[\w.~+/=-]+", re.IGNORECASE),
        r"\1***",
    ),  # Authorization: Bearer ...
)


def mask_secrets(text: str) -> str:
    """Return the text with what looks like a password, token or key replaced by ***.

    Known are the user part of a URL, values of names with `token`, `password`, `secret`, `signature` and the like, and
    what follows Bearer or Basic. A secret without such a sign isn't recognised.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
