"""The results of a validation, as frozen data."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ValidationError, printable
from ..types import Array, html_table

REPORT_SCHEMA = 1
SIGNS = {"equal": "=", "different": "≠"}
"""How a pair's expectation is written."""


@dataclass(frozen=True)
class Side:
    """One artifact, run on the inputs."""

    # "base", "plain" (the adapter's heads and biases without its deltas), "torch",
    # "torch:bfloat16", "peft", "merged", "onnx:<file>", or the caller's own name.
    name: str
    role: str  # "base" (the adapter must change it) or "adapted" (must agree with other such sides)
    source: str  # where it came from; empty for a callable
    precision: str  # of its weights: "float32", "float16", "bfloat16", "int8"
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()  # names and shapes
    seconds: float = 0.0  # how long loading and running took
    notes: tuple[str, ...] = ()  # how it was made, if that is unusual

    def measured(self, outputs: Mapping[str, Array], began: float, *notes: str) -> Side:
        """Adds notes, the outputs' shapes, and the seconds since `began` (time.monotonic)."""
        shapes = tuple((name, tuple(array.shape)) for name, array in outputs.items())
        seconds = round(time.monotonic() - began, 3)
        return replace(self, outputs=shapes, seconds=seconds, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Difference:
    """How two arrays of one output differ, over the positions that count (no padding)."""

    count: int  # number of values
    scale: float  # largest absolute value of the left side
    max_abs: float  # largest absolute difference
    # Largest difference relative to the left value, over values of at least a thousandth of
    # `scale`: near zero a ratio says nothing.
    max_rel: float
    mean_abs: float  # mean absolute difference
    rms: float  # root mean square of the difference
    cosine: float  # of the angle between the two, as vectors
    # Share of rows (last axis) with the same argmax, near-ties included; None for a scalar output.
    argmax: float | None
    index: tuple[int, ...]  # where `max_abs` is
    left: float  # the two values there
    right: float
    # Where `argmax` lies with 95 % confidence (Wilson's interval) if the rows are a fair sample.
    agreement: tuple[float, float] | None
    row_cosine: float  # mean cosine of the angle between the two sides' rows
    # Mean Kullback-Leibler divergence of the right softmax from the left, in nats; of logits only.
    kl: float | None
    perplexity: tuple[float, float] | None  # of both sides, on the tokens of a causal model


@dataclass(frozen=True)
class OutputComparison:
    """One output of two sides, and the verdict."""

    output: str  # its name
    ok: bool  # the verdict
    reason: str  # why not, in one line; empty if ok
    difference: Difference | None  # None if the arrays cannot be compared (missing, other shape)
    allowed_abs: float | None = None  # bound on `difference.max_abs`, if there is one
    allowed_rms: float | None = (
        None  # bound on `difference.rms`: a lower one where they must differ
    )
    # Smallest error of the adapter, as a fraction of its effect, that would have been caught; None
    # if the effect is not known.
    resolution: float | None = None

    @property
    def budget(self) -> str:
        """What was measured against what is allowed, and where the allowance comes from."""
        found, allowed = self.difference, self.allowed_rms
        if found is None or allowed is None:
            return ""
        times = f"{found.rms / allowed:.2g} times" if allowed else "measured against"
        if self.allowed_abs is None:
            return f"The difference is {times} what rounding explains at most ({allowed:.1e})."
        share = f", together {self.resolution:.2%} of it" if self.resolution else ""
        return (
            f"The root mean square difference {found.rms:.1e} is {times} what is allowed, "
            f"{allowed:.1e}: a small share of what the adapter changes, and rounding as it was "
            f"measured{share}."
        )


@dataclass(frozen=True)
class Comparison:
    """Two sides compared."""

    left: str  # name of a side
    right: str
    expect: str  # "equal" (two adapted sides) or "different" (a base and an adapted side)
    precision: str  # whose tolerance applied
    outputs: tuple[OutputComparison, ...]

    @property
    def ok(self) -> bool:
        """Equal: every output agrees. Different: at least one output differs."""
        return (any if self.expect == "different" else all)(output.ok for output in self.outputs)

    @property
    def reason(self) -> str:
        """Why the pair fails; empty if it does not."""
        return "" if self.ok else next(output.reason for output in self.outputs if not output.ok)


@dataclass(frozen=True)
class Cause:
    """Why a side differs, as far as its layers show it."""

    side: str  # its name
    layer: str  # path of the first module whose output differs
    # "scaling", "left out", "twice", "transposed", "entry rule", "seed", "precision", "head",
    # "tied", "adapter", "added" or "base".
    kind: str
    text: str  # the same in words
    difference: float | None  # of the layer's output, relative to it; None without anything like it

    def __str__(self) -> str:
        off = "" if self.difference is None else f" by {self.difference:.2g} of its size"
        return f"{self.side}: {self.layer} is the first layer that differs{off}: {self.text}"


@dataclass(frozen=True)
class Report:
    """The whole validation."""

    task: str | None  # "feature-extraction", ..., or None for plain callables
    inputs: str  # what the sides were run on, in words
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes
    sides: tuple[Side, ...]  # in the order they are compared, references first
    comparisons: tuple[Comparison, ...]  # every pair that was compared
    problems: tuple[str, ...] = ()  # findings that fail the validation without a comparison
    notes: tuple[str, ...] = ()  # what limits the result
    schema: int = REPORT_SCHEMA
    causes: tuple[Cause, ...] = ()  # of each faulty side the first layer that differs, and why

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems and not self.failing

    @property
    def failing(self) -> tuple[Comparison, ...]:
        """The pairs that fail."""
        return tuple(pair for pair in self.comparisons if not pair.ok)

    @property
    def first_failure(self) -> tuple[Comparison, OutputComparison] | None:
        """The first pair that fails and its first failing output."""
        outputs = ((pair, output) for pair in self.failing for output in pair.outputs)
        return next(((pair, output) for pair, output in outputs if not output.ok), None)

    @property
    def findings(self) -> tuple[tuple[str, str], ...]:
        """Where and why each failing output fails, in the order of the pairs."""
        return tuple(
            (f"{pair.left} against {pair.right}, output {output.output}", output.reason)
            for pair in self.failing
            for output in pair.outputs
            if not output.ok
        )

    @property
    def suspects(self) -> tuple[str, ...]:
        """The sides that occur in every failing pair of two or more: usually the culprit."""
        seen = Counter(name for pair in self.failing for name in (pair.left, pair.right))
        failed = len(self.failing)
        return tuple(name for name, times in seen.items() if times == failed) * (failed > 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-ready data; NaN and infinities become None."""
        data: dict[str, Any] = _as_json(asdict(self))
        for pair, entry in zip(self.comparisons, data["comparisons"], strict=True):
            entry["ok"] = pair.ok
        if not self.causes:
            del data["causes"]
        return {"schema": self.schema, "ok": self.ok, "suspects": list(self.suspects), **data}

    def to_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_junit(self) -> str:
        """Returns the report as JUnit XML, which CI systems show: a test for each pair."""
        from xml.etree import ElementTree

        suite = ElementTree.Element("testsuite", name="fourierft-export validate")
        pairs = [(f"{p.left} {SIGNS[p.expect]} {p.right}", p) for p in self.comparisons]
        results = [(name, pair.ok, pair.reason) for name, pair in pairs]
        results += [(f"problem {i}", False, text) for i, text in enumerate(self.problems, 1)]
        for name, ok, reason in results:
            case = ElementTree.SubElement(suite, "testcase", classname="validate")
            case.set("name", printable(name))
            if not ok:
                text = printable("; ".join([reason, *map(str, self.causes)]))
                ElementTree.SubElement(case, "failure", message=printable(reason)).text = text
        suite.set("tests", str(len(results)))
        suite.set("failures", str(sum(not ok for _, ok, _ in results)))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)

    def _repr_html_(self) -> str:
        pairs = [
            (pair.left, SIGNS[pair.expect], pair.right, "ok" if pair.ok else pair.reason)
            for pair in self.comparisons
        ]
        found = (*self.problems, *map(str, self.causes))
        title = "Validation: the artifacts agree" if self.ok else "Validation: they do not agree"
        facts = {"task": self.task, "inputs": self.inputs, "found": ", ".join(found) or "nothing"}
        return html_table(title, facts, pairs)

    def raise_for_failure(self) -> None:
        """Raises if the artifacts do not agree.

        Raises:
            ValidationError: naming the first pair that fails, the output and the place; every
                other finding is among its offenders.
        """
        if self.ok:
            return
        offenders = [*self.problems, *(f"{place}: {reason}" for place, reason in self.findings)]
        where, found = "validate", offenders[0]
        if not self.problems:
            (where, found), offenders = self.findings[0], offenders[1:]
        if self.suspects:
            remedy = f"every failing pair contains {' and '.join(self.suspects)}: make it again"
        elif self.failing and all(pair.expect == "different" for pair in self.failing):
            remedy = "check that the adapter was trained and that its scaling is not 0"
        else:
            last = self.failing[0].right if self.failing else "it"
            remedy = f"make {last} again, of this base and this adapter"
        if self.causes:
            found = f"{found}; likely cause: {self.causes[0]}"
            offenders = [*map(str, self.causes[1:]), *offenders]
        raise ValidationError(
            where,
            expected="artifacts that agree, and an adapter that changes the base",
            found=found,
            remedy=remedy,
            offenders=offenders,
        )


def _as_json(value: Any) -> Any:
    """Converts tuples to lists, and NaN and infinities to None."""
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
