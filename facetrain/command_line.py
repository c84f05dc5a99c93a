"""How every command reads its words: flags and YAML into a Config and back, and a user's mistakes as one line.

Sole importer of jsonargparse.
"""

import dataclasses
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from facetrain.config import Config

EXIT_USAGE = 2
"""The exit code of every command for anything the user gave that can't be used."""
_EXIT_INTERRUPTED = 130
"""As shells have it: 128 and the number of SIGINT."""

_RANK_0_SPEAKS_FIRST_S = 3.0
"""Seconds that other ranks wait before they say what went wrong: what concerns all, rank 0 says alone."""


def parse_config(argv: Sequence[str], prog: str) -> Config:
    """Read a run's settings from `--config FILE` and `--section.key value` flags; flags win.

    Args:
        argv: Command line without the program's name.
        prog: The command as the user typed it, for the help text.

    Raises:
        ValueError: An unknown key, a wrong type, or a value out of bounds; the message is one line that names it.
        SystemExit: `--help` was asked for, with code 0.
    """
    return parse_config_and_flags(argv, prog, "Train a face embedding", lambda parser: None)[0]


def parse_config_and_flags(
    argv: Sequence[str], prog: str, description: str, add_flags: Callable[[Any], None]
) -> tuple[Config, Any]:
    """Read a run's settings and a command's own flags, which `add_flags` adds to the parser; raises as `parse_config`.

    Returns:
        The settings, and the namespace that holds the flags.
    """
    parser = new_parser(prog, f"{description}; any key below can also stand in the YAML file of --config.")
    add_flags(parser)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags win over it")
    for section in fields(Config):
        parser.add_class_arguments(section.type, section.name)
    try:
        given = parse_arguments(parser, argv)
    except ValueError as error:
        # The parser's words about a file that isn't YAML, or no mapping, don't say which file.
        nameless = str(error).startswith(("Problems parsing config", "Unexpected config"))
        raise ValueError(f"{error} in {', '.join(_config_files(argv))}") if nameless else error from None
    for section in fields(Config):
        _check_values_are_there(section.name, section.type, given[section.name])
    sections = parser.instantiate(given)
    return Config(**{section.name: getattr(sections, section.name) for section in fields(Config)}), given


def new_parser(prog: str, description: str) -> Any:
    """Return a command's parser, to which `add_argument` adds as in argparse."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, exit_on_error=False)


def parse_arguments(parser: Any, argv: Sequence[str]) -> Any:
    """Return the namespace of a command line.

    Raises:
        ValueError: An unknown flag or a wrong value; the message is one line that names it.
        SystemExit: `--help` was asked for, with code 0.
    """
    import jsonargparse

    try:
        return parser.parse_args(list(argv))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_one_line(error)) from None


def load_config(file: Path) -> Config:
    """Read the resolved config of a run.

    Raises:
        ValueError: The file holds an unknown key or a wrong value.
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such config")
    try:
        return parse_config(["--config", str(file)], prog="facetrain")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def config_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `--config` reads back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes the strings that only the parser, not YAML 1.1, takes for numbers: an identity may be named 1e3."""

    Dumper.add_representer(
        str, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_number(text) else None)
    )
    plain = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }
    # A setting is a line, however long: in one that is cut, `mask_secrets` may not see which word belongs to a flag.
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, width=float("inf"))


def differing_keys(a: Config, b: Config, *, ignore: Sequence[str] = ()) -> list[str]:
    """Return `key: value of a != value of b` for every dotted key in which two configs differ."""
    flat_b = b.flat()
    return [
        f"{key}: {value!r} != {flat_b[key]!r}"
        for key, value in a.flat().items()
        if value != flat_b[key] and key not in ignore
    ]


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can mend (ValueError, files that can't be used) into one line on stderr and exit code 2.

    Rank 0 speaks for all. Another rank speaks after a while, if the launcher hasn't ended it by then: its trouble is
    its own. An interruption from the keyboard ends in a line too. FACETRAIN_TRACEBACK=1 shows the traceback instead.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("FACETRAIN_TRACEBACK") == "1":
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_RANK_0_SPEAKS_FIRST_S)
        where = f"rank {rank}: " if rank != "0" else ""
        sys.stderr.write(f"facetrain: error: {where}{error}\n")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        if os.environ.get("FACETRAIN_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("facetrain: interrupted\n")
        sys.exit(_EXIT_INTERRUPTED)


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command's main function on sys.argv, with user errors as one line and exit code 2."""
    with user_errors():
        main(sys.argv[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_values_are_there(section: str, settings: Any, values: Any) -> None:
    """Refuse what the parser lets through: a section that is no mapping, and null for a key that can't be null."""
    if not hasattr(values, "as_dict"):
        raise ValueError(f"{section}: expected keys and values, got {values!r}")
    for key in fields(settings):
        if values[key.name] is None and "None" not in str(key.type):
            raise ValueError(f"{section}.{key.name}: expected a value, got null")
        if dataclasses.is_dataclass(key.type):
            _check_values_are_there(f"{section}.{key.name}", key.type, values[key.name])


def _config_files(argv: Sequence[str]) -> list[str]:
    """Return the values of --config."""
    return [file for flag, file in itertools.pairwise(argv) if flag == "--config"] + [
        word.removeprefix("--config=") for word in argv if word.startswith("--config=")
    ]


def _one_line(error: Exception) -> str:
    """Return the parser's message without line breaks, and with keys as they are typed: dotted."""
    message = " ".join(str(error).replace('Parser key "', '"').split())
    if "'off'" in message and message.endswith("Got value: False"):
        message += " (YAML reads a bare off as False: quote it)"
    if "profile_steps" in message and "<class 'int'>" in message:
        message = f"train.profile_steps: {message} (YAML reads a bare 10:20 as a number: quote it)"
    return re.sub(r"Group '(\S+)' does not accept option '(\S+)'", r"unknown key '\1.\2'", message)


def say(text: str) -> None:
    """Print a line on stdout: once, however many ranks there are."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text + "\n")
