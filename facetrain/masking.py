"""Masking: passwords and tokens that a setting may hold stay out of logs and tracking servers."""

import re

_NAMES = r"(?:token|password|passwd|secret|api[_-]?key|access[_-]?key|signature|credential)[\w-]*"
# A quote, also as it stands in a YAML string that is quoted itself: '' within '...', \" within "...".
_QUOTE = r"(?:''?|\\?\")"
_NO_QUOTE = r"(?!\\?['\"])"
# What stands between a flag and its value on a command line, and in a printed list of words.
_BLANK = r"(?:['\"]?,)?[ \t]+"
_NAMED = rf"({_NAMES}{_QUOTE}?\s*[=:]\s*|(?<![\w-])--?[\w-]*{_NAMES}{_BLANK}(?!--))"
_USER = rf"((?<![\w-])(?:-u(?:{_BLANK})?|--(?:proxy-)?user(?:{_BLANK}|=)))"
_HEADER = r"(?:proxy-)?authorization"
_SCHEME = r"(?:(?:bearer|basic|digest|token)\s+)?"
_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(?<=://)[^/\s]+(?=@)", "***"),  # https://user:password@host
        (rf"{_USER}({_QUOTE})[^:'\"\n]*:(?!//)(?:(?!\2)[^\n])+\2", r"\1\2***\2"),  # -u 'user:password'
        (rf"{_USER}[^\s:'\"]*:(?!//)(?:{_NO_QUOTE}\S)+", r"\1***"),  # --user user:password
        (rf"({_QUOTE})({_HEADER}\s*[=:]\s*{_SCHEME})(?:(?!\1)[^\n])+", r"\1\2***"),  # -H 'Authorization: token ...'
        (rf"({_HEADER}{_QUOTE}?\s*[=:]\s*({_QUOTE}){_SCHEME})(?:(?!\2)[^\n])+", r"\1***"),  # "Authorization": "..."
        (rf"(?<!['\"\w-])({_HEADER}\s*[=:]\s*{_SCHEME})(?=[^\s'\"])[^\n]+", r"\1***"),  # Authorization: token ...
        (rf"{_NAMED}({_QUOTE})(?:(?!\2)(?:\\.|[^\\\n]))+\2", r"\1\2***\2"),  # secret: "..."
        (rf"{_NAMED}({_QUOTE}|)(?:{_NO_QUOTE}[^\s&,;])+", r"\1\2***"),  # ?token=..., secret: ..., --password ...
        (rf"([?&](?:sig|key)=)(?:{_NO_QUOTE}[^\s&])+", r"\1***"),  # Azure's and Google's signed URLs
        (r"\b(bearer\s+)[\w.~+/=-]+", r"\1***"),
    )
)


def mask_secrets(text: str) -> str:
    """Return the text with what looks like a password, token or key replaced by ***.

    Known are the user part of a URL, user and password after `-u` and `--user`, values of names and flags with `token`,
    `password`, `secret`, `signature` and the like, the header Authorization, and what follows Bearer. A secret without
    such a sign isn't recognised.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
