"""Changes good inputs into hostile ones: bytes, JSON, safetensors, bundles, protobuf messages."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    0, 1, -1, 2, 3, 4, 255, 2**31, 2**32, 2**33, 2**33 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64,
    10**9, 10**100, 0.0, -0.5, 1.5, 1e38, 1e39, 1e300, True, False, None, "", "a", "F32", "BF16",
    "U8", "U32", "F4", "small", "r64", "explicit", "a.{0-99999}", "{0-9}.{0-9}.{0-9}", "{a,b}",
    "é", "\x1b[31m", "\ud800", "fourierft.x", "__metadata__", "a" * 2000, "a." * 200, [], {}, [[]],
    [0], [1, 2], [0, 0], [2, 3], [10**9, 10**9], {"a": 1}, {"set": {}}, {"absent": ["bias"]},
    {"set": {"bias": 1}, "absent": ["bias", 5]}, "../x", "/etc/passwd", "(a+)+$",
    "model.safetensors",
]  # fmt: skip
KEYS = ["", "x", "set", "shape", "peft", "\x1b", "weight_map", "bias", "modules_to_save", "start"]

INTEGERS = [0, 1, -1, 2, 3, 7, 8, 13, 16, 18, 22, 23, 99, 255, 10**6, 2**31 - 1, -(2**31), 2**40]
INTEGERS += [2**63 - 1, -(2**63)]
FLOATS = [0.0, -1.0, 1e38, 1e-45, float("nan"), float("inf")]
TEXTS = ["", "x", "y", "\x1b[31m", "a\nb", "é", "../x", "/etc/passwd", "\0", "a" * 500, "(a+)+$"]
TEXTS += ["fourierft.spectrum.0", "fourierft.entries.0", "adapter_id", "ai.onnx", "com.microsoft"]
TEXTS += ["location", "offset", "length", "model.onnx", "1000000000000000", "-1", "batch", "value"]
OPERATORS = ["If", "Loop", "Constant", "Identity", "Reshape", "ConstantOfShape", "Expand", "Einsum"]
OPERATORS += ["Tile", "Range", "Gather", "MatMul", "Gemm", "Cast", "QuantizeLinear", "Transpose"]
MAX_MESSAGE = 200_000  # bytes: copies of graphs inside each other would grow without end


def canonical(value: object) -> str:
    """The form of JSON that bundles are in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few edits of bytes: one replaced, some removed, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, size = rng.randrange(len(out) + 1), rng.choice([1, 8, 100])
        put = [bytes([rng.randrange(256)]), b"", out[at : at + size] * 2, b"\x80\x02", b'{"', b",-"]
        out[at : at + size * (rng.random() < 0.8)] = rng.choice(put)
    return bytes(out)


def mutate_text(text: str, rng: random.Random) -> str:
    """A few edits of the text's bytes."""
    return mutate_bytes(text.encode(errors="replace"), rng).decode(errors="replace")


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
        container[rng.choice([*KEYS, f"{key}0"])] = old
    elif action < 0.4:
        container.append(old)
    elif action < 0.6 and isinstance(old, str) and old:
        container[key] = mutate_text(old, rng)
    elif action < 0.6 and type(old) is int:
        container[key] += rng.choice([-1, 1, 2, 2**32])
    else:
        container[key] = rng.choice(VALUES)
    return root[0]


def mutate_json_text(text: bytes, rng: random.Random) -> bytes:
    """A JSON file with one or two nodes changed, now and then with bytes changed."""
    if rng.random() < 0.1:
        return mutate_bytes(text, rng)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(text, rng)
    for _ in range(rng.choice([1, 1, 2])):
        value = mutate_json(value, rng)
    return json.dumps(value).encode()


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A good safetensors file as its header and its payload."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def join(header: object, payload: bytes) -> bytes:
    """A safetensors file of this header and payload."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, another payload, or other bytes anywhere."""
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(data, rng)
    try:
        header, payload = split(data)
    except ValueError:  # mutated before
        return mutate_bytes(data, rng)
    if kind < 0.85:
        header = mutate_json(header, rng)
    else:
        payload = mutate_bytes(payload, rng)
    return join(header, payload)


def sign(header: dict[str, Any], payload: bytes) -> dict[str, Any]:
    """The header of a bundle with the hash that fits it and the payload."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("fourierft"), str):
        return header
    infos = [(n, e) for n, e in header.items() if n != "__metadata__" and isinstance(e, dict)]
    table = canonical([[n, e.get("dtype"), e.get("shape")] for n, e in infos])
    text = f"{metadata['fourierft']}\n{table}\n".encode(errors="replace")
    digest = hashlib.sha256(text + payload).hexdigest()
    return {**header, "__metadata__": {**metadata, "sha256": digest}}


def mutate_bundle(data: bytes, rng: random.Random) -> bytes:
    """One hostile bundle made of a good one; most have a hash that fits."""
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
    header = header if isinstance(header, dict) else {}
    return join(sign(header, payload) if rng.random() < 0.9 else header, payload)


def walk_messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside it."""
    waiting = [message]
    while waiting:
        one = waiting.pop()
        yield one
        for field, value in one.ListFields():
            if field.message_type is not None:
                waiting += value if is_repeated(value) else [value]


def is_repeated(value: Any) -> bool:
    """Whether a field's value is a list (descriptors say so in another way in each protobuf)."""
    return hasattr(value, "extend") and not isinstance(value, bytearray)


def mutate_message(root: Any, rng: random.Random) -> None:
    """Changes one field of one message inside `root`: removed, doubled, moved, or another value."""
    messages = list(walk_messages(root))
    kinds = sorted({one.DESCRIPTOR.name for one in messages})
    chosen = rng.choice(kinds)  # there are more dimensions than functions
    message = rng.choice([one for one in messages if one.DESCRIPTOR.name == chosen])
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.7 else message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if is_repeated(value):
        _mutate_list(value, field, messages, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.message_type is not None:
        same = [one for one in messages if one.DESCRIPTOR is field.message_type]
        if same and rng.random() < 0.8:
            _copy(value, rng.choice(same), root)
        else:
            value.SetInParent()
    else:
        setattr(message, field.name, _scalar(field, value, messages, rng))


def _mutate_list(value: Any, field: Any, messages: list[Any], rng: random.Random) -> None:
    """Removes, doubles, exchanges, adds or changes an element of a repeated field."""
    action, at = rng.random(), rng.randrange(len(value)) if value else 0
    if value and action < 0.25:
        del value[at]
    elif field.message_type is not None:
        same = [one for one in messages if one.DESCRIPTOR is field.message_type]
        if value and action < 0.45:  # the order of nodes and of initializers
            other = rng.randrange(len(value))
            first, second = type(value[at])(), type(value[at])()
            first.CopyFrom(value[at])
            second.CopyFrom(value[other])
            value[at].CopyFrom(second)
            value[other].CopyFrom(first)
        elif same and action < 0.9:
            _copy(value.add(), rng.choice(same), messages[0])
        else:
            value.add()
    elif value and action < 0.8:
        value[at] = _scalar(field, value[at], messages, rng)
    else:
        value.append(_scalar(field, None, messages, rng))


def _copy(target: Any, source: Any, root: Any) -> None:
    copied = type(source)()
    copied.CopyFrom(source)
    if root.ByteSize() + copied.ByteSize() < MAX_MESSAGE:
        target.CopyFrom(copied)


def _scalar(field: Any, old: Any, messages: list[Any], rng: random.Random) -> Any:
    """Another value for a field that is no message: from elsewhere in the model, or hostile."""
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING and field.type == field.TYPE_BYTES:
        return mutate_bytes(old or b"\0\0\0\0", rng)
    if kind == field.CPPTYPE_STRING:
        if field.name == "op_type" and rng.random() < 0.7:
            return rng.choice(OPERATORS)
        if rng.random() < 0.5:
            return rng.choice(sorted(_texts(messages)) or TEXTS)
        if old and rng.random() < 0.3:
            return mutate_text(str(old), rng)
        return rng.choice(TEXTS)
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if kind == field.CPPTYPE_ENUM:
        return rng.choice([one.number for one in field.enum_type.values])
    bits = 32 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    number = rng.choice(INTEGERS) if rng.random() < 0.7 else (old or 0) + rng.choice([-1, 1, 16])
    low = 0 if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else -(2 ** (bits - 1))
    return min(max(number, low), low + 2**bits - 1)


def _texts(messages: list[Any]) -> set[str]:
    """All names and other texts of a model."""
    found: set[str] = set()
    for message in messages:
        for _, value in message.ListFields():
            if isinstance(value, str):
                found.add(value)
            elif is_repeated(value) and value and isinstance(value[0], str):
                found.update(value)
    return {text for text in found if len(text) < 300 and isinstance(text, str)}  # not UTF-8: bytes


def mutate_onnx(model: Any, rng: random.Random) -> None:
    """Changes an onnx.ModelProto: any field of any message, or what takes several at once."""
    action, graph = rng.random(), model.graph
    if action < 0.08 and model.metadata_props:
        entry = rng.choice(model.metadata_props)
        entry.value = mutate_json_text(str(entry.value).encode(errors="replace"), rng).decode(
            errors="replace"
        )
    elif action < 0.12 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        tensor.data_location = 1
        for key in rng.sample(["location", "offset", "length", "checksum", "x"], rng.randrange(4)):
            tensor.external_data.add(key=key, value=rng.choice([*TEXTS, "0", "16", "model.data"]))
        if rng.random() < 0.5:
            tensor.ClearField("raw_data")
    elif action < 0.15 and graph.node:
        _add_functions(model, rng)
    elif action < 0.17 and graph.node:
        _nest(model, rng)
    elif action < 0.2 and graph.node:
        node = rng.choice(graph.node)
        del node.output[:]
        if rng.random() < 0.5:
            node.output.extend(rng.choice(graph.node).output)
    else:
        mutate_message(model, rng)


def _add_functions(model: Any, rng: random.Random) -> None:
    """Adds functions that call each other, in a chain or in a circle, and a call of the first."""
    count, calls = rng.choice([1, 2, 7, 40]), rng.choice([1, 2, 3])
    circle = rng.random() < 0.3
    for i in range(count):
        last = i + 1 == count
        body = model.functions.add(name=f"f{i}", domain="own")
        body.input.append("a")
        body.output.append("b")
        body.opset_import.add(domain="", version=18)
        body.opset_import.add(domain="own", version=1)
        for j in range(calls):
            node = body.node.add(domain="own", op_type=f"f{0 if last else i + 1}")
            if last and not circle:
                node.domain, node.op_type = "", rng.choice(["Identity", "Transpose"])
            node.input.append("a" if j == 0 else f"t{j}")
            node.output.append("b" if j + 1 == calls else f"t{j + 1}")
    if all(entry.domain != "own" for entry in model.opset_import):
        model.opset_import.add(domain="own", version=1)
    node = rng.choice(model.graph.node)
    for i, name in enumerate(node.input):
        if name:
            call = model.graph.node.add(domain="own", op_type="f0", input=[name], output=["called"])
            node.input[i] = "called"
            model.graph.node.insert(0, call)
            del model.graph.node[-1]
            break


def _nest(model: Any, rng: random.Random) -> None:
    """Puts a node into subgraphs of subgraphs, some or many levels deep."""
    inner = type(model.graph)(name="inner")
    inner.node.add().CopyFrom(rng.choice(model.graph.node))
    for depth in range(rng.choice([1, 3, 10, 25])):
        outer = type(model.graph)(name=f"g{depth}")
        node = outer.node.add(op_type=rng.choice(["If", "Loop", "Scan"]), output=[f"n{depth}"])
        node.input.append(rng.choice(sorted(_texts([*model.graph.initializer])) or ["x"]))
        for name in ("then_branch", "else_branch") if depth == 0 else ("body",):
            attribute = node.attribute.add(name=name, type=5)
            attribute.g.CopyFrom(inner)
        inner = outer
    model.graph.node.extend(inner.node)


def mutate_pool(data: bytes, rng: random.Random, folder: Path) -> bytes:
    """A hostile pool: other bytes, or rows, tables and settings that its writer would not make."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    path = folder / "mutated.pool"
    path.write_bytes(data)
    try:
        database = sqlite3.connect(path, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = MEMORY")
            _change_rows(database, rng)
        finally:
            database.close()
        return path.read_bytes()
    except (sqlite3.Error, ValueError, LookupError, TypeError):  # mutated before
        return mutate_bytes(data, rng)
    finally:
        for one in folder.glob("mutated.pool*"):
            one.unlink()


def _change_rows(database: sqlite3.Connection, rng: random.Random) -> None:
    """Changes one row of one table, or the tables themselves."""
    action = rng.random()
    if action < 0.15:
        statements = ["DELETE FROM template", "UPDATE template SET id = id + 1", "VACUUM"]
        statements += ["PRAGMA user_version = 2", "PRAGMA application_id = 0", "DROP TABLE adapter"]
        statements += ["CREATE VIEW v AS SELECT * FROM adapter", "CREATE TABLE more (x)"]
        statements += ["INSERT INTO adapter SELECT name || 'x', 9, own, sha256, payload "
                       "FROM adapter LIMIT 1", "DELETE FROM adapter"]  # fmt: skip
        database.execute(rng.choice(statements))
        return
    if action < 0.3:
        number, file = rng.choice(database.execute("SELECT id, file FROM template").fetchall())
        changed = mutate_bundle(file, rng)
        digest = split(changed)[0]["__metadata__"]["sha256"] if rng.random() < 0.7 else "0"
        statement = "UPDATE template SET file = ?, sha256 = ? WHERE id = ?"
        database.execute(statement, (changed, digest, number))
    rows = database.execute("SELECT name, template, own, sha256, payload FROM adapter").fetchall()
    name, template, own, digest, payload = rng.choice(rows)
    changes = {
        "name": lambda: rng.choice([*TEXTS, 5, None, b"\xff", mutate_text(str(name), rng)]),
        "template": lambda: rng.choice([0, 1, 2, -1, None, "1", 2**62]),
        "own": lambda: canonical(mutate_json(json.loads(own), rng)),
        "payload": lambda: rng.choice([mutate_bytes(payload, rng), b"", "text", None]),
        "sha256": lambda: rng.choice([b"", None, "0", bytes(32)]),
    }
    new = {"name": name, "template": template, "own": own, "payload": payload}
    column = rng.choice(sorted(changes))
    new[column] = changes[column]()
    if column != "sha256" and rng.random() < 0.9 and isinstance(new["payload"], bytes):
        query = "SELECT sha256 FROM template WHERE id = ?"
        found = database.execute(query, (new["template"],)).fetchone()
        text = f"{found[0] if found else ''}\n{new['name']}\n{new['own']}\n"
        new["sha256"] = hashlib.sha256(text.encode(errors="replace") + new["payload"]).digest()
    settings = ", ".join(f"{key} = ?" for key in new)
    database.execute(f"UPDATE adapter SET {settings} WHERE name IS ?", (*new.values(), name))
