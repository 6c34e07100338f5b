"""The exceptions of the package, each with the exit code the command line gives it.

    FourierFTError                 1
    |-- UsageError                 2   wrong or conflicting arguments, or the output exists
    |   `-- MissingExtraError      2   an optional dependency is not installed
    |-- BadInputError              3   a file is damaged, hostile, or not what it should be
    |-- BaseMismatchError          4   the adapter does not belong to this base
    |-- ValidationError            5   artifacts that must agree do not agree
    `-- FileAccessError            6   missing or unreadable files, no space, no permission

Every error says where it happened, what was expected, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from os import PathLike

MAX_OFFENDERS_SHOWN = 20
MAX_PART_LENGTH = 300
MAX_LINE_LENGTH = 500


def printable(text: object) -> str:
    """Escapes the control characters in `text`, so that it is one harmless line on a terminal.

    Names come from untrusted files and may hold escape sequences.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def shortened(text: str, length: int = MAX_LINE_LENGTH) -> str:
    """The beginning and the end of a text that is longer than `length`."""
    half = (length - len(" ... ")) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of another library's message, with the second one if it is a heading."""
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [""]
    heading = first.endswith(":") and rest
    return f"{first} {rest[0]}" if heading else first or type(error).__name__


class FourierFTError(Exception):
    """Root of the package's exceptions.

    Args:
        where: the file, tensor, layer or option concerned.
        expected: what would have been right.
        found: what was found instead.
        remedy: what the user can do now.
        offenders: a line for each culprit if there are several, of which `MAX_LINE_LENGTH`
            characters are kept; the command line prints the first `MAX_OFFENDERS_SHOWN`.
    """

    exit_code = 1
    kind = "error"

    def __init__(
        self,
        where: str | PathLike[str],
        *,
        expected: str = "",
        found: str = "",
        remedy: str = "",
        offenders: Iterable[str] = (),
    ) -> None:
        self.where, self.expected = printable(where), printable(expected)
        self.found, self.remedy = printable(found), printable(remedy)
        self.offenders = tuple(
            shortened(printable(line), MAX_LINE_LENGTH - len("  ")) for line in offenders
        )
        super().__init__(self.summary)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the fields: worker processes send their errors to the main process."""
        fields = self.to_dict()
        del fields["kind"], fields["code"]
        return partial(type(self), **fields), ()  # type: ignore[arg-type]

    @property
    def summary(self) -> str:
        """The error as one line of at most `MAX_LINE_LENGTH` characters."""
        for length in (MAX_PART_LENGTH, MAX_PART_LENGTH // 2, MAX_PART_LENGTH // 3):
            where, expected, found, remedy = (
                shortened(part, length)
                for part in (self.where, self.expected, self.found, self.remedy)
            )
            parts = [f"expected {expected}"] if expected else []
            parts += [f"found {found}"] if found else []
            line = ": ".join(p for p in (where, ", ".join(parts)) if p)
            line = f"{line}; {remedy}" if remedy else line
            if len(line) <= MAX_LINE_LENGTH - len("error: "):
                break
        return line

    def to_dict(self) -> dict[str, object]:
        """The error as the `error` object of `--json` output."""
        return {
            "kind": self.kind,
            "code": self.exit_code,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
            "offenders": list(self.offenders),
        }


class UsageError(FourierFTError):
    """The call has wrong or conflicting arguments, or its output exists."""

    exit_code = 2
    kind = "usage"


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    kind = "missing-extra"


class BadInputError(FourierFTError):
    """An input file is damaged, hostile, or not what it should be."""

    exit_code = 3
    kind = "bad-input"


class BaseMismatchError(FourierFTError):
    """The adapter does not belong to the given base."""

    exit_code = 4
    kind = "base-mismatch"


class ValidationError(FourierFTError):
    """Artifacts that must agree do not agree."""

    exit_code = 5
    kind = "validation"


class FileAccessError(FourierFTError):
    """A path is missing or unreadable, or there is no space or permission to write."""

    exit_code = 6
    kind = "file-access"


def missing_extra(package: str, extra: str, what: str) -> MissingExtraError:
    """Makes the error: `what` needs `package`, which the extra `extra` installs."""
    return MissingExtraError(
        what,
        expected=f"the package {package}",
        found="it is not installed",
        remedy=f"run: pip install 'fourierft-export[{extra}]'",
    )


_PACKAGES = {
    "torch": ("torch", "onnxscript"),
    "ort": ("onnxruntime",),
    "hf": ("transformers", "accelerate", "datasets", "pyarrow", "PIL", "sklearn"),
    "report": ("matplotlib", "jinja2"),
    "dask": ("dask", "distributed"),
    "peft": ("peft",),
}
_EXTRA_OF = {package: extra for extra, packages in _PACKAGES.items() for package in packages}


def extra_of(error: ModuleNotFoundError, what: str) -> MissingExtraError | None:
    """Makes the error for `what` if an extra installs the missing module; else None."""
    package = (error.name or "").partition(".")[0]
    return missing_extra(package, _EXTRA_OF[package], what) if package in _EXTRA_OF else None
