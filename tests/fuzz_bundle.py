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
import warnings
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fourierft_export.bundle.bundle import Bundle
from fourierft_export.bundle.layer_templates import compress, expand
from fourierft_export.errors import FourierFTError

MAX_SECONDS = 1.0
MAX_KILOBYTES = 200_000
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
    """A copy of `value` with one node changed, removed, renamed or doubled."""
    root = [json.loads(json.dumps(value))]
    places: list[tuple[Any, Any]] = [(root, 0)]
    for container, key in places:  # grows while it is walked
        inner = container[key]
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            places += [(inner, one) for one in keys]
    container, key = rng.choice(places)
    old, action = container[key], rng.random()
    if action < 0.2 and container is not root:
        del container[key]
    elif action < 0.4 and isinstance(container, dict):
        container[rng.choice(["", "x", "set", "shape", "peft", "\x1b", f"{key}0"])] = old
    elif action < 0.4:
        container.append(old)
    elif action < 0.6 and isinstance(old, str) and old:
        container[key] = mutate_bytes(old.encode(errors="replace"), rng).decode(errors="replace")
    elif action < 0.6 and type(old) is int:
        container[key] += rng.choice([-1, 1, 2, 2**32])
    else:
        container[key] = rng.choice(VALUES)
    return root[0]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few edits of bytes: one replaced, some removed, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, size = rng.randrange(len(out) + 1), rng.choice([1, 8, 100])
        put = [bytes([rng.randrange(256)]), b"", out[at : at + size] * 2, b"\x80\x02", b'{"', b",-"]
        out[at : at + size * (rng.random() < 0.8)] = rng.choice(put)
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


def fuzz(seconds: float, seed: int, *, max_seconds: float = MAX_SECONDS) -> Counter[str]:
    """How often each outcome came up in `seconds` of mutants; stops at the first failure."""
    rng, last = random.Random(seed), b""
    good = [path.read_bytes() for path in GOLDEN]
    outcomes: Counter[str] = Counter(try_one(data) for data in good)
    before, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            last = mutant(rng.choice(good), rng)
            began = time.process_time()
            outcome = try_one(last)
            if time.process_time() - began > max_seconds:
                raise TimeoutError(f"more than {max_seconds} s of processor time")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MAX_KILOBYTES:
                raise MemoryError(f"more than {MAX_KILOBYTES} KB")
            outcomes[outcome] += 1
            if outcome == "opened" and len(good) < 200:  # worth mutating further
                good.append(last)
    except Exception:
        path = Path(f"fuzz-{hashlib.sha256(last).hexdigest()[:16]}.safetensors")
        path.write_bytes(last)
        print(f"seed {seed}: failed on {path}")
        raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args()
    warnings.simplefilter("error")
    outcomes = fuzz(options.seconds, options.seed)
    for name, count in outcomes.most_common():
        print(f"{count:9,}  {name}")
    print(f"{outcomes.total():9,}  inputs, seed {options.seed}: no failure")


if __name__ == "__main__":
    main()
