"""Pools: many adapters for one base in one file, an SQLite database (FORMAT.md, section Pool)."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from ..errors import BadInputError, BaseMismatchError, FileAccessError, UsageError, printable
from ..files import strict_json
from ..files.safetensors_reader import open_regular, read_exactly
from ..files.staging import staged_file
from .bundle import Bundle
from .pool_template import (
    Template,
    decode,
    encode_payload,
    entry_kind,
    make_template,
    read_template,
)
from .spec import LayerSpec

MAGIC = b"SQLite format 3\0"
APPLICATION_ID = 0x46465450
VERSION = 1
MAX_NAME_LENGTH = 200
_TABLES = {
    "template": "CREATE TABLE template (id INTEGER PRIMARY KEY, sha256 TEXT UNIQUE, file BLOB)",
    "adapter": "CREATE TABLE adapter (name TEXT PRIMARY KEY, template INTEGER, own TEXT, "
    "sha256 BLOB, payload BLOB)",
}


class Pool(Mapping[str, Bundle]):
    """Adapters for one base in one file: a mapping from name to bundle.

    What the adapters share (layers, shapes, fingerprints of the base, PEFT's config) is stored
    once. Opening reads none of them, and each is read alone. Changes are atomic: whenever the
    process dies, the file holds what it held before or after. Threads may share a pool.

    Args:
        path: of the file, *.fourierft.pool by custom.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not a pool, or a damaged one.

    Example:
        >>> import fourierft_export as ff, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> bundle = ff.capture(ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)), config))
        >>> path = tempfile.mkdtemp() + "/tenants.fourierft.pool"
        >>> pool = ff.Pool.create(path, {"a": bundle, "b": bundle})
        >>> pool.remove(["b"])
        >>> list(pool), pool["a"].sha256 == bundle.sha256
        (['a'], True)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._templates: dict[int, Template] = {}
        if not is_pool(path):
            raise BadInputError(path, expected="a pool of adapters", found="another kind of file")
        with self._reading():
            # Not "ro": what a killed writer left is rolled back before anything is read.
            self._database = _connect(self.path, "rw")
            self._database.execute("PRAGMA query_only = ON")
            check = "SELECT application_id, user_version FROM pragma_application_id, "
            found = self._database.execute(check + "pragma_user_version").fetchone()
            tables = self._database.execute(
                "SELECT name, sql FROM sqlite_master WHERE type != 'index' OR sql IS NOT NULL"
            )
            known = found == (APPLICATION_ID, VERSION) and dict(tables) == _TABLES
        if not known:
            self._database.close()
            expected = f"a pool of adapters, version {VERSION}"
            raise BadInputError(path, expected=expected, found="another database")

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        adapters: Mapping[str, Bundle],
        *,
        force: bool = False,
    ) -> Pool:
        """Writes a new pool.

        Args:
            path: of the file, *.fourierft.pool by custom.
            adapters: bound bundles for one base, by name.
            force: replace an existing file.

        Returns:
            The pool, open.

        Raises:
            UsageError: the file exists, without `force`; an unbound bundle; a name that is empty
                or longer than 200 characters.
            BaseMismatchError: bundles for different bases.
        """
        with staged_file(path, force=force) as partial:
            database = _connect(partial, "rwc")
            try:
                # Small pages waste little at the end of an adapter.
                database.execute("PRAGMA page_size = 512")
                database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                database.execute(f"PRAGMA user_version = {VERSION}")
                for statement in _TABLES.values():
                    database.execute(statement)
                _insert(database, adapters, str(path))
                database.commit()
            except sqlite3.Error as error:  # no space left
                raise _translated(error, Path(path)) from error
            finally:
                database.close()
        return cls(path)

    def __getitem__(self, name: str) -> Bundle:
        """Reads one adapter and checks its hash.

        Raises:
            KeyError: no adapter of this name.
            BadInputError: it is damaged.
        """
        with self._lock, self._reading():
            query = "SELECT template, own, sha256, payload FROM adapter WHERE name = ?"
            found = self._database.execute(query, (name,)).fetchone()
        if found is None:
            raise KeyError(name)
        number, own, digest, payload = found
        where = f"{self.path}, adapter {printable(name)}"
        texts = isinstance(own, str) and isinstance(payload, bytes) and isinstance(number, int)
        template = self._template(number) if texts else None
        good = template is not None and len(payload) == template.size
        if not good or template is None or digest != _digest(name, template.bundle, own, payload):
            raise BadInputError(
                where,
                expected="an adapter with the hash that the pool holds",
                found="another hash",
                remedy="the file is damaged: get it again, or remove this adapter and add it again",
            )
        return decode(template, strict_json.loads(own, where), payload, where)

    def __contains__(self, name: object) -> bool:
        with self._lock, self._reading():
            query = "SELECT 1 FROM adapter WHERE name = ?"
            return self._database.execute(query, (str(name),)).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        with self._lock, self._reading():
            rows = self._database.execute("SELECT name FROM adapter ORDER BY name").fetchall()
        names = [name for (name,) in rows]
        if not all(isinstance(name, str) for name in names):
            raise BadInputError(self.path, expected="names that are text", found="others")
        return iter(names)

    def __len__(self) -> int:
        with self._lock, self._reading():
            return int(self._database.execute("SELECT count(*) FROM adapter").fetchone()[0])

    def add(self, adapters: Mapping[str, Bundle]) -> None:
        """Adds adapters by name, all of them or none; they replace adapters of these names."""
        self.update(adapters)

    def remove(self, names: Iterable[str]) -> None:
        """Removes the named adapters, all of them or none."""
        self.update({}, names)

    def update(self, adapters: Mapping[str, Bundle], removed: Iterable[str] = ()) -> None:
        """Removes and adds adapters in one step; readers see all of it or nothing.

        Args:
            adapters: bundles to add, by name; they replace adapters of these names.
            removed: names to remove. Their bytes become zeros, and later adapters take the space.

        Raises:
            UsageError: a name that a pool cannot hold, or no adapter of a name to remove.
            BaseMismatchError: bundles for another base than the pool's.
            FileAccessError: the file cannot be written, or another process is writing it.
        """
        with self._lock, self._reading():
            database = _connect(self.path, "rw")
            try:
                database.execute("PRAGMA secure_delete = ON")
                database.execute("BEGIN IMMEDIATE")
                _remove(database, list(removed), str(self.path))
                _insert(database, adapters, str(self.path))
                unused = "DELETE FROM template WHERE id NOT IN (SELECT template FROM adapter)"
                database.execute(unused)
                database.commit()
            finally:
                database.close()  # without a commit, this undoes everything
            self._templates.clear()

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _template(self, number: int) -> Template:
        with self._lock:
            if number not in self._templates:
                with self._reading():
                    query = "SELECT file FROM template WHERE id = ?"
                    found = self._database.execute(query, (number,)).fetchone()
                if found is None or not isinstance(found[0], bytes):
                    raise BadInputError(self.path, expected="a template", found="none")
                self._templates[number] = read_template(found[0], str(self.path))
            return self._templates[number]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # Python decodes the messages of SQLite, which repeat damaged names.
            raise _translated(error, self.path) from error


def is_pool(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a pool does."""
    fd = open_regular(path)
    try:
        return read_exactly(fd, 0, min(os.fstat(fd).st_size, len(MAGIC)), path) == MAGIC
    finally:
        os.close(fd)


def open_from_pool(source: str | os.PathLike[str]) -> Bundle | None:
    """Opens POOL#NAME, or the only adapter of POOL; None if `source` is no path of a pool."""
    path, mark, name = os.fspath(source), "", ""
    if not os.path.lexists(path):
        path, mark, name = path.rpartition("#")
    if not os.path.isfile(path) or not is_pool(path):
        return None
    with Pool(path) as pool:
        names = [name] if mark else list(pool)
        if len(names) == 1 and names[0] in pool:
            return pool[names[0]]
        known = [*names[:20], *(["..."] if len(names) > 20 else [])]
    raise UsageError(
        path,
        expected="the name of an adapter in this pool",
        found=f"{name!r}" if mark else f"none of its {len(names)}",
        remedy="write POOL#NAME; `fourierft-export inspect POOL` lists the names",
        offenders=() if mark else known,
    )


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"file:{quote(os.fspath(path.absolute()))}?mode={mode}"
    database = sqlite3.connect(address, uri=True, check_same_thread=False, timeout=10)
    database.text_factory = lambda text: text.decode("utf-8")
    # The file may be hostile: no functions of its own, and broken pages are noticed.
    for setting in ("trusted_schema = OFF", "cell_size_check = ON"):
        database.execute(f"PRAGMA {setting}")
    return database


def _translated(error: Exception, path: Path) -> Exception:
    if isinstance(error, sqlite3.OperationalError):
        return FileAccessError(path, expected="a pool that can be used", found=str(error))
    return BadInputError(path, expected="a pool of adapters", found=str(error))


def _digest(name: str, template: Bundle, own: str, payload: bytes) -> bytes:
    # With the name: damage must not exchange two adapters.
    digest = hashlib.sha256(f"{template.sha256}\n{name}\n{own}\n".encode())
    digest.update(payload)
    return digest.digest()


def _remove(database: sqlite3.Connection, names: list[str], where: str) -> None:
    """Deletes adapters in the open transaction."""
    delete = "DELETE FROM adapter WHERE name = ?"
    missing = [name for name in names if not database.execute(delete, (name,)).rowcount]
    if missing:
        raise UsageError(
            where,
            expected="names of adapters in the pool",
            found=f"{len(missing)} that it does not hold",
            offenders=missing,
        )


def _insert(database: sqlite3.Connection, adapters: Mapping[str, Bundle], where: str) -> None:
    """Writes adapters in the open transaction."""
    lengths = {name: len(name.encode(errors="ignore").decode()) for name in adapters}
    bad = [
        name for name, length in lengths.items() if not 0 < length == len(name) <= MAX_NAME_LENGTH
    ]
    bad += [name for name, bundle in adapters.items() if not bundle.is_bound]
    if bad:
        raise UsageError(
            where,
            expected=f"bound bundles, under names of 1 to {MAX_NAME_LENGTH} characters",
            found=f"{len(bad)} that are not",
            remedy="give the base (--base) to bind them",
            offenders=bad,
        )
    stored = database.execute("SELECT id, sha256, file FROM template").fetchall()
    numbers = {digest: number for number, digest, _ in stored}
    known: dict[str, tuple[str, LayerSpec]] = {}
    for _, digest, file in stored:
        for layer in Bundle.from_bytes(file, where).layers:
            known[layer.name] = f"the pool's template {digest[:12]}", layer
    shared: dict[str, Template] = {}
    for name, bundle in adapters.items():
        template = make_template(bundle)
        digest = template.sha256
        if digest not in shared:
            _check_base(name, bundle, known, where)
            data = template.to_bytes()
            shared[digest] = read_template(data, where)
        if digest not in numbers:
            statement = "INSERT INTO template (sha256, file) VALUES (?, ?)"
            numbers[digest] = database.execute(statement, (digest, data)).lastrowid
        hashes = {entry_kind(layer): layer.entries_sha256 for layer in reversed(bundle.layers)}
        hashes = {kind: hashes[kind] for kind in shared[digest].kinds}
        own = strict_json.canonical([bundle.spec.seed, bundle.spec.scaling, [*hashes.values()]])
        payload = encode_payload(bundle, shared[digest])
        if decode(shared[digest], json.loads(own), payload, name).spec != bundle.spec:
            raise UsageError(
                f"adapter {name!r}",
                expected="entries, and a PEFT config, that follow from the adapter's seed",
                found="others",
                remedy="pack the adapter again",
            )
        row = name, numbers[digest], own, _digest(name, template, own, payload), payload
        database.execute("INSERT OR REPLACE INTO adapter VALUES (?, ?, ?, ?, ?)", row)


def _check_base(
    name: str, bundle: Bundle, known: dict[str, tuple[str, LayerSpec]], where: str
) -> None:
    """Refuses a bundle for another base than that of the layers `known`, and adds its layers."""
    facts = ("shape", "fan_in_fan_out", "fingerprint")
    misfits = [
        f"{layer.name}: unlike that of {known[layer.name][0]}"
        for layer in bundle.layers
        if layer.name in known
        and any(getattr(layer, f) != getattr(known[layer.name][1], f) for f in facts)
    ]
    if misfits:
        raise BaseMismatchError(
            where,
            expected="adapters for one base",
            found=f"{len(misfits)} layers of {name!r} with another base weight",
            remedy="make a pool for each base",
            offenders=misfits,
        )
    known.update({layer.name: (repr(name), layer) for layer in bundle.layers})
