"""The one command `facetrain`. Each command imports what is heavy when it runs."""

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress

from facetrain import __version__
from facetrain.command_line import new_parser, parse_arguments, say, user_errors
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


def completion(argv: Sequence[str]) -> None:
    """Print a script that completes commands, flags and files."""
    parser = new_parser(
        "facetrain completion", 'For bash and zsh: eval "$(facetrain completion)" in ~/.bashrc, ~/.zshrc.'
    )
    parse_arguments(parser, argv)
    cases = []
    for name, command in _COMMANDS.items():
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            command(["--help"])
        flags = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text.getvalue())))
        cases.append(f"        {name}) words='{' '.join(flags)}' ;;")
    say(_COMPLETION.format(commands=" ".join(_COMMANDS), cases="\n".join(cases)))


_COMPLETION = """\
[ -z "$ZSH_VERSION" ] || {{ autoload -U +X compinit bashcompinit && compinit && bashcompinit; }}
_facetrain() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=''
    if [ "$COMP_CWORD" = 1 ]; then
        words='{commands} --help --version'
    elif [ "${{word#-}}" != "$word" ]; then
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -o bashdefault -F _facetrain facetrain"""

_COMMANDS["completion"] = completion

_USAGE = "usage: facetrain COMMAND ...\n\n" + "\n".join(
    f"  {name:11} {command.__doc__}" for name, command in _COMMANDS.items()
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
