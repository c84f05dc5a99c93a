"""The one command `facetrain`. Each command imports what is heavy when it runs."""

import sys
from collections.abc import Callable, Sequence

from facetrain import __version__
from facetrain.command_line import say, user_errors
from facetrain.commands.cluster import doctor, launch
from facetrain.commands.data import audit, inspect, pack, synth
from facetrain.commands.evaluation import compare, lfw
from facetrain.commands.people import embed, export, index, search
from facetrain.commands.retrieval import retrieval
from facetrain.commands.training import check, estimate, sync, train

_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (
        *(synth, pack, inspect, audit, train, check, estimate, doctor, launch, sync, lfw, compare, retrieval),
        *(embed, export, index, search),
    )
}

_USAGE = "usage: facetrain COMMAND ...\n\n" + "\n".join(
    f"  {name:10}{command.__doc__}" for name, command in _COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `facetrain COMMAND ...`; a user's error is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0] if words else "--help"), words[1:]
    with user_errors():
        if name in ("-h", "--help"):
            say(_USAGE)
        elif name == "--version":
            say(__version__)
        elif name in _COMMANDS:
            _COMMANDS[name](rest)
        else:
            raise ValueError(f"'{name}': expected a command, one of {', '.join(_COMMANDS)}")
