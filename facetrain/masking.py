"""Masking: passwords and tokens that a setting may hold stay out of logs and tracking servers."""

import re

_NAMES = r"(?:token|password|passwd|secret|api[_-]?key|access[_-]?key|signature|credential)[\w-]*"
# What stands between a flag and its value on a command line, and in a printed list of words.
_BLANK = r"(?:['\"]?,)?[ \t]+"
_NAMED = rf"({_NAMES}['\"]?\s*[=:]\s*|(?<![\w-])--?[\w-]*{_NAMES}{_BLANK}(?!--))"
_USER = rf"((?<![\w-])(?:-u(?:{_BLANK})?|--(?:proxy-)?user(?:{_BLANK}|=)))"
_HEADER = r"(?:proxy-)?authorization"
_SCHEME = r"(?:(?:bearer|basic|digest|token)\s+)?"
_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(?<=://)[^/\s]+(?=@)", "***"),  # https://user:password@host
        (rf"{_USER}(['\"])[^:'\"\n]*:(?!//)(?:(?!\2)[^\n])+\2", r"\1\2***\2"),  # -u 'user:password'
        (rf"{_USER}[^\s:'\"]*:(?!//)[^\s'\"]+", r"\1***"),  # --user user:password
        (rf"(['\"])({_HEADER}\s*[=:]\s*{_SCHEME})(?:(?!\1)[^\n])+", r"\1\2***"),  # -H 'Authorization: token ...'
        (rf"({_HEADER}['\"]?\s*[=:]\s*(['\"]){_SCHEME})(?:(?!\2)[^\n])+", r"\1***"),  # "Authorization": "token ..."
        (rf"(?<!['\"\w-])({_HEADER}\s*[=:]\s*{_SCHEME})(?=[^\s'\"])[^\n]+", r"\1***"),  # Authorization: token ...
        (rf"{_NAMED}(['\"])(?:\\.|(?!\2)[^\\\n])+\2", r"\1\2***\2"),  # secret: "..."
        (rf"{_NAMED}(['\"]?)[^\s&'\",;]+", r"\1\2***"),  # ?token=..., secret: ..., --password ...
        (r"([?&](?:sig|key)=)[^\s&'\"]+", r"\1***"),  # Azure's and Google's signed URLs
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
