"""Mutates bundle files and opens them: `python tests/fuzz_bundle.py --seconds 60`.

Whatever the bytes, `Bundle.from_bytes` gives a bundle that can be written again, or raises one of
the package's own errors; it takes no more than a second and 200 MB. The first input that does
otherwise is written to the current folder, and the exit code is 1.

Half of the inputs are mutated under a hash that fits, so that they get past it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.layer_templates import compress, expand
from fourierft_export.errors import FourierFTError

MAX_SECONDS = 1.0
MAX_MEGABYTES = 200
MAX_ENTRIES_ELEMENTS = 1_000_000  # deriving the entries of very large layers takes seconds

GOLDEN = sorted((Path(__file__).resolve().parent / "golden").glob("*.fourierft.safetensors"))
VALUES: list[Any] = [
    0, 1, -1, 2, 3, 4, 255, 2**31, 2**32, 2**33, 2**33 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64,
    10**9, 10**100, 0.0, -0.5, 1.5, 1e38, 1e39, 1e300, True, False, None, "", "a", "F32", "BF16",
    "U8", "U32", "F4", "small", "r64", "explicit", "a.{0-99999}", "{0-9}.{0-9}.{0-9}", "{a,b}",
    "é", "\x1b[31m", "\ud800", "fourierft.x", "__metadata__", "a" * 2000, "a." * 200, [], {}, [[]],
    [0], [1, 2], [0, 0], [2, 3], [10**9, 10**9], {"a": 1}, {"set": {}}, {"absent": ["bias"]},
    {"set": {"bias": 1}, "absent": ["bias", 5]},
]  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A good file as its header and its payload."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def join(header: dict[str, Any], payload: bytes, *, sign: bool = True) -> bytes:
    """A file of this header; with `sign`, its hash is made to fit."""
    metadata = header.get("__metadata__")
    if sign and isinstance(metadata, dict) and isinstance(metadata.get("fourierft"), str):
        infos = [(n, e) for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)]
        table = canonical([[n, e.get("dtype"), e.get("shape")] for n, e in infos])
        digest = hashlib.sha256(
            f"{metadata['fourierft']}\n{table}\n".encode(errors="replace") + payload
        )
        header = {**header, "__metadata__": {**metadata, "sha256": digest.hexdigest()}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def mutate_json(value: Any, rng: random.Random) -> Any:
    """`value` with one node changed, added, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.7:
            return {**value, key: mutate_json(value[key], rng)}
        if action < 0.8:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.9:
            return {
                **value,
                rng.choice(["x", "shape", "peft", "base_dtype", key + "0"]): value[key],
            }
        return {(rng.choice(["", "a", "set", "\x1b"]) if k == key else k): v
                for k, v in value.items()}  # fmt: skip
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.7:
            return [*value[:at], mutate_json(value[at], rng), *value[at + 1 :]]
        return value[:at] + value[at + 1 :] if action < 0.85 else [*value, value[at]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        return bytes(mutate_bytes(value.encode(errors="replace"), rng)).decode(errors="replace")
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice([-1, 1, 2, 2**32])
    return rng.choice(VALUES)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few edits of bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not out:
            break
        at = rng.randrange(len(out))
        action = rng.randrange(5)
        if action == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            out[at] = rng.randrange(256)
        elif action == 2:
            del out[at : at + rng.choice([1, 8, 100])]
        elif action == 3:
            out[at:at] = out[at : at + rng.choice([1, 8, 100])]
        else:
            out[at:at] = bytes(rng.choice([[0], [255], [0x7B], [0x22], [0x80, 2], [0x2C, 0x2D]]))
    return bytes(out)


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One hostile file made of a good one."""
    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(data, rng)
    header, payload = split(data)
    if kind < 0.75:
        spec = json.loads(header["__metadata__"]["fourierft"])
        for _ in range(rng.choice([1, 1, 2])):
            spec = mutate_json(spec, rng)
        header["__metadata__"]["fourierft"] = canonical(spec)
    elif kind < 0.9:
        header = mutate_json(header, rng)
    else:
        payload = mutate_bytes(payload, rng)
    return join(header if isinstance(header, dict) else {}, payload, sign=rng.random() < 0.9)


def try_one(data: bytes) -> str:
    """Open one file; the name of the error, or "opened".

    Raises:
        Exception: anything that is not the package's own, or a bundle that does not write itself.
    """
    try:
        bundle = Bundle.from_bytes(data)
    except FourierFTError as error:
        if not error.summary.isprintable():
            raise ValueError("a summary that a terminal does not show as it is") from error
        return type(error).__name__
    again = bundle.to_bytes()
    if Bundle.from_bytes(again).to_bytes() != again:
        raise ValueError("a bundle that changes when it is written")
    names = [layer.name for layer in bundle.layers]
    if expand(compress(names)) != names:
        raise ValueError("names that change when they are written")
    for layer in bundle.layers:
        if layer.shape is not None and prod(layer.shape) <= MAX_ENTRIES_ELEMENTS:
            try:
                bundle.entries(layer.name)
            except FourierFTError:
                return "opened, entries refused"
    return "opened"


def peak_megabytes() -> float:
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def fuzz(
    seconds: float,
    seed: int,
    *,
    max_seconds: float = MAX_SECONDS,
    on_failure: Callable[[bytes, Exception], None] | None = None,
) -> Counter[str]:
    """How often each outcome came up in `seconds` of mutants; stops at the first failure.

    Args:
        max_seconds: processor time that one file may take.
        on_failure: called with the bytes and the error before it is raised.
    """
    rng = random.Random(seed)
    good = [path.read_bytes() for path in GOLDEN]
    outcomes: Counter[str] = Counter(try_one(data) for data in good)
    before, end = peak_megabytes(), time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutant(rng.choice(good), rng)
        began = time.process_time()
        try:
            outcome = try_one(data)
            if time.process_time() - began > max_seconds:
                raise TimeoutError(f"more than {max_seconds} s")
            if peak_megabytes() - before > MAX_MEGABYTES:
                raise MemoryError(f"more than {MAX_MEGABYTES} MB")
        except Exception as error:
            if on_failure:
                on_failure(data, error)
            raise
        outcomes[outcome] += 1
        # What still opens is worth mutating further.
        if outcome == "opened" and len(good) < 200:
            good.append(data)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 2**32

    warnings.simplefilter("error")

    def keep(data: bytes, error: Exception) -> None:
        path = Path(f"fuzz-{hashlib.sha256(data).hexdigest()[:16]}.safetensors")
        path.write_bytes(data)
        traceback.print_exception(error)
        print(f"seed {seed}: {type(error).__name__} on {path}")
        sys.exit(1)

    outcomes = fuzz(options.seconds, seed, on_failure=keep)
    for name, count in outcomes.most_common():
        print(f"{count:9,}  {name}")
    print(f"{outcomes.total():9,}  inputs, seed {seed}, peak {peak_megabytes():.0f} MB: no failure")


if __name__ == "__main__":
    main()
