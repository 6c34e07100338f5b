"""What every verb shares: errors as one line or one object, names escaped, interrupts, progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export import errors
from fourierft_export.cli import console, main
from fourierft_export.cli.console import Outcome, size_text, verb
from fourierft_export.cli.main import run, verbs
from fourierft_export.types import Progress

ESC = "\x1b[31m"
Add = Callable[[click.Command], None]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """`add(command)`: one more verb, for this test only."""

    def put(command: click.Command) -> None:
        monkeypatch.setitem(verbs.commands, command.name or "", command)

    return put


def failing(error: BaseException) -> click.Command:
    @verb()
    def fail() -> Outcome:
        raise error

    return fail


CODES: dict[type[errors.FourierFTError], int] = {
    errors.FourierFTError: 1,
    errors.UsageError: 2,
    errors.MissingExtraError: 2,
    errors.BadInputError: 3,
    errors.BaseMismatchError: 4,
    errors.ValidationError: 5,
    errors.FileAccessError: 6,
}


@pytest.mark.parametrize("kind", CODES)
def test_errors_have_their_codes(
    kind: type[errors.FourierFTError], add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    add(failing(kind(f"file{ESC}", expected="a\nb", found="c", remedy="d", offenders=["e\x07"])))
    assert run(["fail"]) == CODES[kind]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: file\\x1b[31m: expected a\\nb, found c; d\n  e\\x07\n"
    assert run(["fail", "--json", "--debug"]) == CODES[kind]
    shown = capsys.readouterr()
    fields = {"where": "file\\x1b[31m", "expected": "a\\nb", "found": "c", "remedy": "d"}
    fields |= {"kind": kind.kind, "code": CODES[kind], "offenders": ["e\\x07"]}  # type: ignore[dict-item]
    assert json.loads(shown.out) == {"schema": 1, "ok": False, "error": fields}
    # For the person who reads the log.
    assert "Traceback" in shown.err and "\nerror: file" in shown.err


def test_at_most_twenty_offenders(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    for count, last in ((1, "  offender 0"), (20, "  offender 19"), (5000, "  ... and 4981 more")):
        offenders = [f"offender {i}" for i in range(count)]
        add(failing(errors.BaseMismatchError("base", offenders=offenders)))
        assert run(["fail", "--json"]) == 4
        shown = capsys.readouterr()
        lines = shown.err.splitlines()
        assert (len(lines), lines[-1]) == (1 + min(count, 20), last)
        assert len(json.loads(shown.out)["error"]["offenders"]) == count


def test_an_unexpected_error_is_a_line_and_debug_shows_it(
    add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    add(failing(ZeroDivisionError(f"oh{ESC}\nsecond line")))
    assert run(["fail"]) == 1
    shown = capsys.readouterr()
    assert shown.err == (
        "error: unexpected error: ZeroDivisionError: oh\\x1b[31m; run it again with --debug and "
        "report what it prints\n"
    )
    assert run(["fail", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "unexpected"
    assert run(["fail", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_exit_that_is_no_closed_pipe_keeps_its_code(add: Add) -> None:
    add(failing(SystemExit(7)))
    with pytest.raises(SystemExit) as caught:
        run(["fail"])
    assert caught.value.code == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupts(error: BaseException, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add(failing(error))
    assert run(["fail", "--json"]) == 130
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == 130
    assert shown.err.strip().endswith("error: interrupted")


def test_usage_errors_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pack", "--json"]) == 2
    shown = capsys.readouterr()
    fields = json.loads(shown.out)["error"]
    assert (fields["kind"], fields["code"]) == ("usage", 2)
    assert fields["where"] == "fourierft-export pack" and "--output" in fields["found"]
    assert shown.err.count("\n") == 1
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("Usage: fourierft-export")
    assert "\nCommands:\n" in shown.err and "\\n" not in shown.err


def test_main_exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["inspect", str(tmp_path / "absent")])
    assert caught.value.code == 6
    monkeypatch.setattr("sys.argv", ["fourierft-export", "--version"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 0


def test_text_is_shown_as_it_is(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no escapes, no wrapping, no highlighting."""
    line = "[bold]x[/bold] " + "word " * 60 + "[red"

    @verb()
    def say() -> Outcome:
        return Outcome({"a": 1}, [line, f"esc{ESC}"], [f"note [b]{ESC}"])

    add(say)
    assert run(["say"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{line}\nesc\\x1b[31m\n"
    assert shown.err == "note: note [b]\\x1b[31m\n"
    assert run(["say", "--json"]) == 0
    shown = capsys.readouterr()
    notes = [f"note [b]{ESC}"]
    assert json.loads(shown.out) == {"schema": 1, "ok": True, "a": 1, "notes": notes}
    assert ESC not in shown.out
    assert shown.err == "note: note [b]\\x1b[31m\n"


def test_a_failed_result_is_shown_before_its_error(
    add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    @verb()
    def prove() -> Outcome:
        failure = errors.ValidationError("pair", found="a difference")
        return Outcome({"prove": 1}, ["the table"], failure=failure)

    add(prove)
    assert run(["prove"]) == 5
    shown = capsys.readouterr()
    assert shown.out == "the table\n"
    assert shown.err == "error: pair: found a difference\n"
    assert run(["prove", "--json"]) == 5
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["error"]["kind"] == "validation"
    assert answer["prove"] == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_on_a_terminal_only(
    terminal: bool, add: Add, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SHOW_PROGRESS_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    @verb()
    def work(progress: Progress) -> Outcome:
        progress(f"working{ESC}", 1, 2)
        return Outcome({}, ["done"])

    add(work)
    assert run(["work"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "done\n"
    assert "working" in shown.err if terminal else shown.err == ""
    assert f"working{ESC}" not in shown.err


def test_a_long_layer_name_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "FOURIERFT"}', "utf-8")
    name = "base_model.model.block." + "abcdefghij" * 30 + ".fourierft_spectrum"
    save_file({name: np.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert run(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "abcdefghij" * 30 in "".join(c for c in shown if c in "abcdefghij")


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 999_999)] == ["0 bytes", "999,999 bytes"]
    assert [size_text(n) for n in (2_100_000, 13_500_000_000)] == ["2.1 MB", "13.5 GB"]
