"""Mutates inputs and opens them: `python tests/fuzz/run.py --minutes 5 --kind onnx --kind peft`.

Whatever the input (a bundle, PEFT folder, sharded checkpoint, ONNX file or pool), a public function
gives a result or one of the package's own errors, with a summary that a terminal can show. It takes
no more than a second of processor time (ONNX files: two, since ONNX Runtime expands functions
slowly; it alone limits what it computes as it loads a model) and 200 MB, prints nothing, and leaves
nothing on the disk when it fails. Every other input is written to a folder
`fuzz-KIND-SEED-NUMBER`, once for each place that fails, and the exit code is 1. An input that ends
the process, or takes 20 seconds, stays in `fuzz-KIND-SEED-last`, with the stack.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fourierft_export.errors import FourierFTError
from tests.fuzz.kinds import KINDS, Case, Door, Files, VerbRefusedError, mutate_files, remove

MAX_KILOBYTES = 200_000
MAX_GOOD, MAX_GOOD_BYTES = 200, 50_000  # mutants that open are mutated further
HANG_SECONDS = 20  # of processor time, after which the process is ended
CODES = {2, 3, 4, 6}


@dataclass
class Findings:
    """What came of a run: (door, outcome) -> how often, and the failures by their place."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    kilobytes: int = 0


class Silence:
    """Collects what anybody prints, in Python or in C, and what libraries log."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `collect`

    @contextlib.contextmanager
    def collect(self) -> Iterator[Silence]:
        saved = {number: os.dup(number) for number in (1, 2)}
        handler = logging.StreamHandler(self._text)
        handler.setLevel(logging.WARNING)
        # The package's own warnings are for the user; here only how they look counts.
        handler.addFilter(
            lambda record: (
                not record.name.startswith("fourierft_export")
                or not record.getMessage().isprintable()
            )
        )
        logging.getLogger().addHandler(handler)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for number in saved:
                os.dup2(self._file.fileno(), number)
            with contextlib.redirect_stdout(self._text), contextlib.redirect_stderr(self._text):
                yield self
        finally:
            for number, old in saved.items():
                os.dup2(old, number)
                os.close(old)
            logging.getLogger().removeHandler(handler)
            self._file.close()

    def printed(self) -> str:
        """What was printed since the last call."""
        text = self._text.getvalue()
        if text:
            self._text.seek(0)
            self._text.truncate()
        if os.fstat(self._file.fileno()).st_size:
            self._file.seek(0)
            text += self._file.read().decode(errors="replace")
            self._file.seek(0)
            self._file.truncate()
        return text


def open_case(door: Door, case: Case, silence: Silence) -> str:
    """Opens one input and returns the outcome.

    Raises:
        Exception: whatever must not be.
    """
    try:
        door.open(case)
        outcome = "opened"
    except VerbRefusedError as refused:
        outcome = f"exit code {refused.args[0]}"
    except FourierFTError as error:
        if error.exit_code not in CODES:
            raise
        shown = (error.summary, *error.offenders)
        if not error.summary or not all(line.isprintable() for line in shown):
            raise AssertionError(
                f"lines that a terminal does not show as they are: {shown}"
            ) from error
        outcome = type(error).__name__
    printed = silence.printed()
    if printed:
        raise AssertionError(f"printed: {printed[:300]!r}")
    if outcome != "opened" and case.left_behind():
        raise AssertionError(f"left on the disk: {case.left_behind()}")
    return outcome


def fuzz(
    kind: str,
    seed: int,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    max_seconds: float | None = None,
    begun: Callable[[Files], None] | None = None,
    failed: Callable[[int, str, Files], None] = lambda number, text, files: None,
) -> Findings:
    """Opens so many mutants, or for so long.

    Args:
        kind: a key of `KINDS`.
        seed: the same seed gives the same mutants.
        cases: how many; None is no limit.
        seconds: how long; None is no limit.
        max_seconds: of processor time for each, in place of the kind's own limit.
        begun: called with every input before it is opened; a case that does not end then ends
            the process.
        failed: called with the number, the failure and the input, at the first of each place.
    """
    table, rng, found = KINDS[kind], random.Random(f"{kind} {seed}"), Findings()
    limit = table.seconds if max_seconds is None else max_seconds
    memory = Path("/dev/shm")
    end = time.monotonic() + (seconds if seconds is not None else 10**9)
    with contextlib.ExitStack() as stack:
        root = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
            )
        )
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        silence = stack.enter_context(Silence().collect())
        shared, place = root / "shared", root / "case"
        write_good, good = _load(kind), []
        good = write_good(shared)
        for files in good:  # imports and caches are no growth
            for door in table.doors:
                if not door.file or door.file in files:
                    open_case(door, Case(files, place, shared, random.Random(0)), silence)
                    remove(place)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        number = 0
        while (cases is None or number < cases) and time.monotonic() < end:
            number += 1
            files = mutate_files(rng.choice(good), rng, root)
            doors = [one for one in table.doors if not one.file or one.file in files]
            if not doors:
                continue
            door = rng.choices(doors, [one.weight for one in doors])[0]
            case = Case(files, place, shared, random.Random(rng.random()))
            if begun:
                begun(files)
                signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
            began, outcome = time.process_time(), "failed"
            try:
                outcome = open_case(door, case, silence)
                took = time.process_time() - began
                found.slowest = max(found.slowest, took)
                if took > limit:
                    raise TimeoutError(f"{door.name}: more than {limit} s of processor time")
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                found.kilobytes = max(found.kilobytes, grown)
                if grown > MAX_KILOBYTES:
                    before += grown
                    raise MemoryError(f"{door.name}: {grown} KB more than before")
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                outcome = "failed"
                where = describe(door, error)
                silence.printed()
                if where not in found.failures:
                    text = "".join(traceback.format_exception(error))
                    found.failures[where] = f"case {number}: {text}"
                    failed(number, f"{where}\n\n{text}", files)
            finally:
                if begun:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            found.outcomes[door.name, outcome] += 1
            remove(place)
            size = sum(map(len, files.values()))
            if outcome == "opened" and len(good) < MAX_GOOD and size < MAX_GOOD_BYTES:
                good.append(files)
    return found


def _load(kind: str) -> Callable[[Path], list[Files]]:
    """Returns the function that writes the shared files and makes the good inputs."""
    from tests.fuzz.kinds import write_shared

    def make(shared: Path) -> list[Files]:
        write_shared(shared)
        return KINDS[kind].make(shared)

    return make


def describe(door: Door, error: BaseException) -> str:
    """The door, the error, and the innermost line of the package or the fuzzer that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "fourierft_export" in f.filename or "/tests/fuzz/" in f.filename]
    last = own[-1] if own else frames[-1]
    first_words = " ".join(str(error).split()[:6])[:80]
    place = f"{Path(last.filename).name}:{last.name}"
    return f"{door.name.split()[0]}: {type(error).__name__} at {place}: {first_words}"


def run_kind(kind: str, seed: int, cases: int | None, seconds: float | None) -> Findings:
    """Fuzzes one kind in this process, which an endless case ends; failures become folders."""

    def write(number: int | str, text: str, files: Files) -> None:
        folder = Path(f"fuzz-{kind}-{seed}-{number}")
        (folder / "input").mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / "input" / name).write_bytes(data)
        (folder / "failure.txt").write_text(text, errors="backslashreplace")

    last = Path(f"fuzz-{kind}-{seed}-last")
    last.mkdir(exist_ok=True)

    def begun(files: Files) -> None:
        shutil.rmtree(last / "input", ignore_errors=True)
        write("last", "the process died, or this case did not end; see stack.txt", files)

    with open(last / "stack.txt", "w") as stack:
        faulthandler.enable(stack)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        faulthandler.register(signal.SIGPROF, stack, chain=True)
        found = fuzz(kind, seed, cases=cases, seconds=seconds, begun=begun, failed=write)
        faulthandler.disable()
        faulthandler.unregister(signal.SIGPROF)
    shutil.rmtree(last)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="in all; 1 unless --cases is given")
    parser.add_argument("--cases", type=int, help="of each kind")
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="repeatable; all")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args()
    kinds = options.kind or [*KINDS]
    minutes = options.minutes or (None if options.cases else 1.0)
    seconds = None if minutes is None else 60 * minutes / len(kinds)
    failed = False
    for kind in kinds:
        began, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                found = pool.submit(run_kind, kind, options.seed, options.cases, seconds).result()
            except BrokenProcessPool:
                print(f"{kind}, seed {options.seed}: the process died, or a case did not end")
                failed = True
                continue
        took = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        for (door, outcome), count in sorted(found.outcomes.items()):
            print(f"{count:11,}  {kind}, {door}: {outcome}")
        total = found.outcomes.total()
        print(
            f"{total:11,}  {kind} in all, seed {options.seed}: {total / took:.0f} a second "
            f"({total / max(used, 0.01):.0f} a second of processor time), the slowest took "
            f"{found.slowest:.2f} s, {found.kilobytes:,} KB of growth, "
            f"{len(found.failures)} places that fail",
            flush=True,
        )
        for where in found.failures:
            print(f"    {where}")
        failed = failed or bool(found.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
