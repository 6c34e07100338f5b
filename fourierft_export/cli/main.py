"""`fourierft-export`: the group of verbs, exit codes, and errors as one line or one JSON object."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import click

from .. import __version__
from ..errors import FileAccessError, FourierFTError, extra_of, printable
from .apply import apply
from .completion import COMPLETE_VARIABLE, completion
from .console import emit_error
from .demo import demo
from .diff import diff
from .error_of_many_processes import report_once
from .export import export
from .inspect import inspect
from .merge import merge
from .pack import pack
from .push import push
from .recover import recover
from .train import train
from .unpack import unpack
from .validate import validate
from .verify import verify

NAME = "fourierft-export"
INTERRUPTED = 130


class _Verbs(click.Group):
    """Lists the verbs in the order in which they are used, and suggests near names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            near = get_close_matches(args[0], self.commands)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 2 wrong usage; 3 damaged or hostile input; 4 the bundle does not "
    "belong to this base; 5 validation failed; 6 missing or unreadable files, or no space; 130 "
    "interrupted.",
)
@click.version_option(__version__, package_name="fourierft-export")
def verbs() -> None:
    """FourierFT adapters, from training and PEFT checkpoints to deployable models.

    An adapter is trained here, or by PEFT and then packed. The result is a bundle: one small file,
    which can be merged into its base, exported to ONNX, and applied to an existing ONNX file.
    """


for _verb in (
    demo, train, pack, unpack, inspect, diff, merge, verify, recover, export, apply, validate, push,
    completion
):  # fmt: skip
    verbs.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with one of the codes that `--help` names."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(words: Sequence[str]) -> int:
    """Runs `fourierft-export WORDS` and returns its exit code."""
    as_json, debug = "--json" in words, "--debug" in words
    if not debug:
        _quiet_libraries()
    try:
        code = verbs.main(
            list(words),
            prog_name=NAME,
            complete_var=COMPLETE_VARIABLE,
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The pipe's reader has ended (`| head`), for which click and rich exit: not a failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - printed as one line
        unexpected = not isinstance(error, (click.UsageError, click.Abort, KeyboardInterrupt))
        if debug and unexpected:
            lines = traceback.format_exc().splitlines()
            click.echo("\n".join(map(printable, lines)), err=True)
        fields, text = _describe(error, " ".join([NAME, *words[:1]]))
        with report_once() if words[:1] == ["train"] else nullcontext(True) as mine:
            if mine:
                emit_error(fields, text, as_json=as_json)
        return int(fields["code"])


def _describe(error: BaseException, verb: str) -> tuple[dict[str, Any], str]:
    """An error as the fields of the JSON object and as one line."""
    missing = extra_of(error, verb) if isinstance(error, ModuleNotFoundError) else None
    known = error if isinstance(error, FourierFTError) else missing
    if isinstance(error, OSError) and isinstance(error.filename, (str, os.PathLike)):
        found = error.strerror or str(error)
        known = FileAccessError(
            error.filename, expected="a file or folder that stays as it is meanwhile", found=found
        )
    if known is not None:
        return known.to_dict(), known.summary
    where = ""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else NAME
        kind, code, found = "usage", 2, error.format_message().rstrip(".")
        text = f"{where}: {found}; see {where} --help"
    elif isinstance(error, (click.Abort, KeyboardInterrupt)):
        # click replaces the interrupt by Abort; the verb's message says what it left on the disk.
        kept = str(error if isinstance(error, KeyboardInterrupt) else error.__cause__ or "")
        kind, code, found = "interrupted", INTERRUPTED, f"an interrupt{kept and '; '}{kept}"
        text = found.removeprefix("an ").replace("interrupt", "interrupted", 1)
    else:
        line = (str(error).splitlines() or [""])[0]
        kind, code, found = "unexpected", 1, f"{type(error).__name__}: {line}"
        text = f"unexpected error: {found}; run it again with --debug and report what it prints"
    fields = {"kind": kind, "code": code, "where": where, "expected": "", "found": found}
    return {**fields, "remedy": "", "offenders": []}, text


def _quiet_libraries() -> None:
    """Keeps other libraries' advice and progress bars out of stderr."""
    warnings.simplefilter("ignore")
    quiet = {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for name in (
        "onnx_ir",
        "torchao",
        "torch.utils._pytree",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
