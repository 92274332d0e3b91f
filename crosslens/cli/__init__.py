"""The command `crosslens`: one thin module per subcommand, imported when it is called.

Imports nothing heavy, so that `crosslens --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from crosslens import __version__
from crosslens.allocator import keep_freed_memory
from crosslens.errors import CrosslensError, UsageError, suggestion
from crosslens.openmp import give_way

COMMANDS = {
    "demo": ("crosslens.cli.demo", "train, judge and report a small crosscoder, offline"),
    "train": ("crosslens.cli.train", "train a coder on the activations of one or more models"),
    "recipes": ("crosslens.cli.recipes", "list the named configurations that train takes"),
    "resume": ("crosslens.cli.resume", "go on with a training that was stopped"),
    "evaluate": ("crosslens.cli.evaluate", "judge a run on held-out tokens"),
    "diff": ("crosslens.cli.diff", "what differs between a run's two models, beside its nulls"),
    "interact": ("crosslens.cli.interact", "how latents interact through MLPs and attention"),
    "prove": ("crosslens.cli.prove", "bounds on a model that hold for certain, and their cost"),
    "report": ("crosslens.cli.report", "write a run's report.html, one self-contained file"),
    "show": ("crosslens.cli.show", "show a latent's top examples in the terminal"),
    "runs": ("crosslens.cli.runs", "list the runs in a folder with their main figures"),
    "organism": ("crosslens.cli.organism", "plant a known behaviour in a model, to diff"),
    "doctor": ("crosslens.cli.doctor", "what this machine has, and what to change"),
}
"""Name → the module, which has `run(argv: Sequence[str]) -> int`, and its line in the help."""

# What torch says when the memory of a device or of the machine is used up.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 fine, 1 error, 2 usage, 3 diverged, 4 a claim does not hold, 75 interrupted and resumable.
    Errors go to stderr as one sentence; with `--debug` anywhere, as a traceback.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != "--debug"]
    keep_freed_memory()
    give_way()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # a parser has printed its help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        # Whoever read stdout (`| head`) has had enough; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:  # the one place where everything is caught
        if "--debug" in given:
            traceback.print_exc()
        message, code = _explained(error)
        print(message, file=sys.stderr)
        return code


def _dispatch(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"crosslens {__version__}")
        return 0
    if command not in COMMANDS:
        near = suggestion(command, COMMANDS)
        raise UsageError(f"Unknown command {command!r}.{near or ' See `crosslens --help`.'}")
    module = importlib.import_module(COMMANDS[command][0])
    code: int = module.run(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""\
usage: crosslens COMMAND [OPTIONS]

Sparse coders for language models: train them, judge them, read them.

commands:
{rows}

`crosslens COMMAND --help` lists a command's options.

options:
  -h, --help  show this and exit
  --version   print the version and exit
  --debug     show a traceback where a command fails"""


def _explained(error: BaseException) -> tuple[str, int]:
    """One sentence for the user, and the exit code."""
    match error:
        case CrosslensError():
            return f"error: {error}", error.exit_code
        case KeyboardInterrupt():
            return "interrupted: `crosslens resume RUN` goes on from the last checkpoint.", 75
        case MemoryError() | RuntimeError() if _is_out_of_memory(error):
            return f"error: {_no_memory(error)}", 1
        case _:
            kind, text = type(error).__name__, " ".join(str(error).split())
            return f"unexpected error (bug): {kind}: {text} (run with --debug for the traceback)", 1


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def _no_memory(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0].strip(" .")
    return (
        f"The memory is used up{f' ({first})' if first else ''}. Use fewer latents, sites or rows "
        "in a batch, or a smaller model; `crosslens doctor` shows what there is."
    )
