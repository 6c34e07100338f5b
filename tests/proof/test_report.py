"""What a report says about a failure, and what of it reaches JSON, a terminal and a page."""

from __future__ import annotations

import json
from io import StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

import fourierft_export as ff
from fourierft_export.errors import UsageError, ValidationError
from fourierft_export.proof.render import render_html, render_text
from fourierft_export.proof.report import Report
from fourierft_export.proof.tolerances import Tolerance, resolve_tolerances

X = {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)}


def report_of(**factors: float) -> Report:
    """Sides that multiply their input; the base by 1."""
    sides = {name: lambda inputs, f=f: {"y": inputs["x"] * f} for name, f in factors.items()}
    return ff.validate(sides={"base": lambda inputs: {"y": inputs["x"]}, **sides}, inputs=X)


def test_the_first_pair_that_differs_is_named_with_its_place() -> None:
    report = report_of(torch=2.0, good=2.0, bad=2.1, worse=3.0)
    assert not report.ok
    first = report.first_failure
    assert first is not None
    pair, output = first
    assert (pair.left, pair.right, output.output) == ("torch", "bad", "y")
    assert output.difference is not None and output.difference.index == (0, 0)
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    error = caught.value
    assert error.exit_code == 5
    assert error.where == "torch against bad, output y"
    assert "y[0, 0] is -2 against -2.1" in error.found
    assert len(error.offenders) == 4  # good/bad, torch/worse, good/worse, bad/worse


def test_a_single_culprit_is_named() -> None:
    report = report_of(torch=2.0, one=2.0, odd=2.5, other=2.0)
    assert report.suspects == ("odd",)
    with pytest.raises(ValidationError, match="every failing pair contains odd"):
        report.raise_for_failure()


def test_an_adapter_without_effect_fails_although_all_agree() -> None:
    report = report_of(torch=1.0, other=1.0)
    assert all(pair.ok for pair in report.comparisons if pair.expect == "equal")
    with pytest.raises(ValidationError, match="the adapter changes nothing in y"):
        report.raise_for_failure()


def test_a_hundredth_of_a_small_effect_is_seen() -> None:
    assert report_of(torch=1.008, other=1.008).ok
    report = report_of(torch=1.008, other=1.00808)
    assert not report.ok
    first = report.first_failure
    assert first is not None and "of what the adapter changes" in first[1].reason


def test_what_could_not_be_seen_is_noted() -> None:
    report = report_of(torch=1 + 1e-4, other=1 + 1e-4)
    assert report.ok
    assert any("would not be seen" in note for note in report.notes)
    alone = ff.validate(
        sides={"a": lambda x: {"y": x["x"]}, "b": lambda x: {"y": x["x"]}}, inputs=X
    )
    assert alone.ok
    assert any("was not checked" in note for note in alone.notes)


def test_tolerances_can_be_set() -> None:
    sides = {"a": lambda x: {"y": x["x"]}, "b": lambda x: {"y": x["x"] * 1.01}}
    assert not ff.validate(sides=sides, inputs=X).ok
    assert ff.validate(sides=sides, inputs=X, tolerances={"float32": 0.02}).ok
    assert ff.validate(sides=sides, inputs=X, tolerances={"float32": Tolerance(0.02)}).ok
    assert not ff.validate(sides=sides, inputs=X, tolerances={"bfloat16": 0.02}).ok
    assert resolve_tolerances({"float32": 0.02})["float32"] == Tolerance(0.02)
    for wrong in ({"float8": 0.1}, {"float32": -1.0}, {"float32": float("nan")}):
        with pytest.raises(UsageError):
            ff.validate(sides=sides, inputs=X, tolerances=wrong)
    with pytest.raises(UsageError):
        Tolerance(0.1, argmax=1.5)


def test_the_report_is_json_and_says_ok_itself() -> None:
    good, bad = report_of(torch=2.0, other=2.0), report_of(torch=2.0, other=np.nan)
    for report in (good, bad):
        text = json.dumps(report.to_dict(), allow_nan=False)
        data = json.loads(text)
        assert data["schema"] == 1
        assert data["ok"] is report.ok
        assert [pair["ok"] for pair in data["comparisons"]] == [p.ok for p in report.comparisons]
    data = good.to_dict()
    assert data["sides"][0]["name"] == "base"
    assert data["comparisons"][0]["outputs"][0]["difference"]["index"] == [0, 0]


def test_the_terminal_shows_every_pair_and_the_verdict() -> None:
    def shown(report: Report) -> str:
        console = Console(file=StringIO(), width=160)
        console.print(render_text(report))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    good = shown(report_of(torch=2.0, other=2.0))
    assert "torch = other" in good and "base ≠ torch" in good
    assert "OK: 1 pair agrees, 2 differ as they must." in good
    alone = shown(report_of(torch=2.0))
    assert "OK, but only partly checked: 1 pair differs as it must; no two sides" in alone
    bad = shown(report_of(torch=2.0, good=2.0, other=2.1))
    assert "FAILED: 2 of 6 pairs. Every failing pair contains other." in bad


def test_a_pair_takes_one_line_of_eighty_columns() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(render_text(report_of(**{"onnx:merged.onnx": 2.0, "onnx:unmerged.onnx": 2.0})))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    pair = next(line for line in lines if "onnx:merged.onnx = onnx:unmerged.onnx" in line)
    for figure in ("0.00e+00", "1.000000", "100.0%", "ok"):
        assert figure in pair


def test_names_from_files_reach_neither_terminal_nor_page_unescaped() -> None:
    name = "evil\x1b[31m [red]<script>alert(1)</script>"
    report = report_of(**{name: 2.0, "other": 2.1})
    console = Console(file=StringIO(), width=200)
    console.print(render_text(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text and "[red]" in text
    page = render_html(report)
    assert "<script" not in page and "\x1b" not in page


def test_junit_and_notebooks() -> None:
    report = report_of(torch=2.0, other=2.1)
    suite = ElementTree.fromstring(report.to_junit())
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    (failure,) = suite.iter("failure")
    assert "y[0, 0] is -2 against -2.1" in (failure.get("message") or "")
    assert json.loads(report.to_json()) == report.to_dict()
    table = report._repr_html_()
    assert "<td>torch</td><td>=</td><td>other</td>" in table and "do not agree" in table
    evil = report_of(**{"<script>\x1b": 2.0, "other": 2.1})
    assert "<script" not in evil._repr_html_() and ElementTree.fromstring(evil.to_junit())


def test_the_page_stands_alone() -> None:
    page = render_html(report_of(torch=2.0, other=2.1))
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert '<b style="left:' in page
    for word in ("http://", "https://", "<script", "<link"):
        assert word not in page
    assert "FAILED: torch against other, output y" in page
    assert "y[0, 0] is -2 against -2.1" in page
    assert "what rounding explains at most" in page and "prefers-color-scheme: dark" in page
