"""What a validation found: frozen data that says everything and prints nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from ..errors import ValidationError

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Side:
    """One artifact, run on the inputs.

    Attributes:
        name: "base", "plain" (the adapter's heads and biases without its deltas), "torch",
            "torch:bfloat16", "peft", "merged", "onnx:<file>", or the caller's own name.
        role: "base" (the adapter must change it) or "adapted" (must agree with its like).
        source: where it came from; empty for a callable.
        precision: of its weights: "float32", "float16", "bfloat16", "int8".
        outputs: names of its outputs, with their shapes.
        seconds: how long loading and running took.
        notes: what a reader should know about how it was made.
    """

    name: str
    role: str
    source: str
    precision: str
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """How two arrays of one output differ, over the positions that count.

    Attributes:
        count: number of values compared (padding left out).
        scale: largest absolute value of the left side.
        max_abs: largest absolute difference.
        max_rel: largest difference relative to the left value, over values of at least a
            thousandth of `scale` (near zero a ratio says nothing).
        mean_abs: mean absolute difference.
        rms: root mean square of the difference.
        cosine: cosine of the angle between the two, as vectors.
        argmax: fraction of rows (last axis) with the same argmax, or None for a scalar output;
            near-ties count as the same.
        index: where `max_abs` is.
        left, right: the two values there.
    """

    count: int
    scale: float
    max_abs: float
    max_rel: float
    mean_abs: float
    rms: float
    cosine: float
    argmax: float | None
    index: tuple[int, ...]
    left: float
    right: float


@dataclass(frozen=True)
class OutputComparison:
    """One output of two sides, and the verdict.

    Attributes:
        output: its name.
        ok: the verdict.
        reason: why not, in one line; empty if ok.
        difference: the numbers; None if the arrays could not be compared (missing, other shape).
        allowed_abs: bound on `difference.max_abs`; None if it was not bounded.
        allowed_rms: bound on `difference.rms` (a lower bound in a comparison that demands a
            change); None if it was not bounded.
        resolution: smallest error of the adapter, as a fraction of its effect, that this
            comparison would have caught; None if the effect is not known.
    """

    output: str
    ok: bool
    reason: str
    difference: Difference | None
    allowed_abs: float | None = None
    allowed_rms: float | None = None
    resolution: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two sides compared.

    Attributes:
        left, right: names of the sides.
        expect: "equal", or "different" (the adapter must change something).
        precision: whose tolerance applied.
        outputs: one entry per output.
    """

    left: str
    right: str
    expect: str
    precision: str
    outputs: tuple[OutputComparison, ...]

    @property
    def ok(self) -> bool:
        """Equal: every output agrees. Different: at least one output differs."""
        if self.expect == "different":
            return any(output.ok for output in self.outputs)
        return all(output.ok for output in self.outputs)


@dataclass(frozen=True)
class Report:
    """The whole validation.

    Attributes:
        task: "feature-extraction", ..., or None for plain callables.
        inputs: what the sides were run on, in words.
        input_shapes: name and shape of every input.
        sides: in the order they are compared, references first.
        comparisons: every pair that was compared.
        problems: findings that fail the validation without a comparison, one line each.
        notes: what limits the result, one line each.
    """

    task: str | None
    inputs: str
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...]
    sides: tuple[Side, ...]
    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    schema: int = field(default=REPORT_SCHEMA)

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems and all(pair.ok for pair in self.comparisons)

    @property
    def first_failure(self) -> tuple[Comparison, OutputComparison] | None:
        """The first pair that fails and its first failing output."""
        for pair in self.comparisons:
            if not pair.ok:
                return pair, next(output for output in pair.outputs if not output.ok)
        return None

    @property
    def suspects(self) -> tuple[str, ...]:
        """The sides that occur in every failing pair of two or more: usually the culprit."""
        failing = [pair for pair in self.comparisons if not pair.ok]
        seen = Counter(name for pair in failing for name in (pair.left, pair.right))
        if len(failing) < 2:
            return ()
        return tuple(name for name, times in seen.items() if times == len(failing))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; numbers that JSON has no word for become None."""
        data: dict[str, Any] = _plain(self)
        for pair, entry in zip(self.comparisons, data["comparisons"], strict=True):
            entry["ok"] = pair.ok
        return {"schema": self.schema, "ok": self.ok, "suspects": list(self.suspects), **data}

    def raise_for_failure(self) -> None:
        """Raise if the artifacts do not agree.

        Raises:
            ValidationError: naming the first pair that fails, the output and the place; every
                other finding is among its offenders.
        """
        if self.ok:
            return
        offenders = [*self.problems, *self._failure_lines()]
        first = self.first_failure
        where, found = "validate", offenders[0]
        if not self.problems and first is not None:
            pair, output = first
            where, found = (
                f"{pair.left} against {pair.right}, output {output.output}",
                output.reason,
            )
            offenders = offenders[1:]
        raise ValidationError(
            where,
            expected="artifacts that agree, and an adapter that changes the base",
            found=found,
            remedy=self._remedy(),
            offenders=offenders,
        )

    def _remedy(self) -> str:
        if self.suspects:
            return f"every failing pair contains {' and '.join(self.suspects)}: make it again"
        failing = [pair for pair in self.comparisons if not pair.ok]
        if failing and all(pair.expect == "different" for pair in failing):
            return "check that the adapter was trained and that its scaling is not 0"
        last = failing[0].right if failing else "it"
        return f"make {last} again, of this base and this adapter"

    def _failure_lines(self) -> list[str]:
        return [
            f"{pair.left} against {pair.right}, output {output.output}: {output.reason}"
            for pair in self.comparisons
            if not pair.ok
            for output in pair.outputs
            if not output.ok
        ]


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and floats as dicts, lists and JSON numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
