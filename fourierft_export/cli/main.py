"""`fourierft-export`: the group of verbs, exit codes, and errors as one line or one JSON object."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import click

from .. import __version__
from ..errors import FourierFTError, extra_of
from ..train.voice import one_voice
from .apply import apply
from .console import emit_error
from .demo import demo
from .export import export
from .inspect import inspect
from .merge import merge
from .pack import pack
from .recover import recover
from .train import train
from .unpack import unpack
from .validate import validate
from .verify import verify

INTERRUPTED = 130


class _InOrder(click.Group):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 2 usage; 3 bad or hostile input; 4 the bundle does not belong to "
    "this base; 5 validation failed; 6 files, paths or space; 130 interrupted.",
)
@click.version_option(__version__, package_name="fourierft-export")
def verbs() -> None:
    """FourierFT adapters, from training and PEFT checkpoints to deployable models.

    train an adapter or pack PEFT's into one small file, merge it into its base, export it to ONNX,
    apply it to an ONNX file, and prove that all of them agree.
    """


for _verb, _does in (
    (demo, "The whole job on real images, without a download."),
    (train, "Rows and a model -> bundle."),
    (pack, "PEFT adapter directory -> one small, checked file."),
    (unpack, "Bundle -> PEFT adapter directory."),
    (inspect, "What a bundle, adapter, checkpoint or ONNX file holds."),
    (merge, "Checkpoint + bundles -> checkpoint."),
    (verify, "A merged directory against its manifest."),
    (recover, "The bundle back out of what it was merged into."),
    (export, "Model + bundles -> ONNX."),
    (apply, "Existing ONNX file + bundles -> ONNX, without PyTorch."),
    (validate, "Proof that artifacts agree, or the first pair that does not."),
):
    _verb.short_help = _does
    verbs.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done; 2 usage; 3 bad or hostile input; 4 the bundle does not belong to this base;
    5 validation failed; 6 files, paths or space; 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(words))


def run(words: Sequence[str]) -> int:
    """The exit code of `fourierft-export WORDS`."""
    as_json, debug = "--json" in words, "--debug" in words
    if not debug:
        _quiet_libraries()

    def tell(error: dict[str, object], text: str) -> None:
        # Of processes that train together, one says what went wrong.
        with one_voice() if words[:1] == ["train"] else nullcontext(True) as mine:
            if mine:
                emit_error(error, text, as_json=as_json)

    try:
        code = verbs.main(list(words), prog_name="fourierft-export", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except FourierFTError as error:
        if debug:
            traceback.print_exc()
        tell(error.to_dict(), error.summary)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "fourierft-export"
        found = error.format_message().rstrip(".")
        text = f"{where}: {found}; see {where} --help"
        tell(_plain("usage", 2, where, found), text)
        return 2
    except (click.Abort, KeyboardInterrupt) as error:
        # click turns the interrupt into an exception of its own; a verb may have said what is left.
        kept = str(error if isinstance(error, KeyboardInterrupt) else error.__cause__ or "")
        text = f"interrupted; {kept}" if kept else "interrupted"
        found = f"an interrupt; {kept}" if kept else "an interrupt"
        tell(_plain("interrupted", INTERRUPTED, "", found), text)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader went away (`| head`), which click and rich make an exit: nothing is wrong, and
        # there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: a person sees a line
        if debug:
            traceback.print_exc()
        verb = " ".join(["fourierft-export", *words[:1]])
        missing = extra_of(error, verb) if isinstance(error, ModuleNotFoundError) else None
        if missing:
            tell(missing.to_dict(), missing.summary)
            return missing.exit_code
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        text = f"unexpected error: {found}; run it again with --debug and report what it prints"
        tell(_plain("unexpected", 1, "", found), text)
        return 1


def _plain(kind: str, code: int, where: str, found: str) -> dict[str, object]:
    """An error that is none of the package's own."""
    blank = {"expected": "", "remedy": "", "offenders": []}
    return {"kind": kind, "code": code, "where": where, "found": found, **blank}


def _quiet_libraries() -> None:
    """Keep other libraries' advice and progress bars out of stderr; --debug lets them speak."""
    warnings.simplefilter("ignore")
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "critical"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is
        logging.getLogger(name).setLevel(logging.CRITICAL)
