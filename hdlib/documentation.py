"""An English corpus out of the documentation that every installation has on its disk.

Distillation needs text, and a machine without a network cannot download any. It does have Python and the
packages this library stands on, and these carry megabytes of careful English in their docstrings. `gather`
reads them without importing anything, keeps the running prose, drops what is said twice, and leaves two
parquet files in a cache. The result depends on the Python version and on the required distributions alone: an
unrelated package in the same environment changes nothing.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm.auto import tqdm

RECIPE = 1  # to be raised whenever this file would make another corpus of the same sources
MINIMUM_BYTES = 8_000_000
VALIDATION_PERCENT = 4
REQUIREMENTS = (  # where the search starts if hdlib runs from a checkout that was never installed
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "matplotlib",
    "ipywidgets", "papermill", "jupyterlab", "pandas", "scikit-learn",
)  # fmt: skip
UNWANTED = {"test", "tests", "idle_test", "_vendor", "_vendored", "site-packages", "dist-packages"}


class Package(NamedTuple):
    """A distribution, or Python itself; a call of `files` lists its files as (relative path, real path)."""

    name: str
    version: str
    files: Callable[[], Iterable[tuple[Path, Path]]]


class Module(NamedTuple):
    """A Python file: the package that ships it, its dotted name, and its path."""

    package: str
    name: str
    path: Path


class Document(NamedTuple):
    """The prose of one docstring or topic; `source` is the dotted name of the module it stands in."""

    paragraphs: list[str]
    package: str
    source: str

    @property
    def text(self) -> str:
        """The paragraphs as one string, an empty line between them."""
        return "\n\n".join(self.paragraphs)


# ------------------------------------------------------------------------------------------------- the corpus


def gather(cache_dir: Path | None = None) -> Path:
    """Return the folder with the corpus, `train.parquet` and `validation.parquet`; made at first use.

    Both have the columns `text` (one document, paragraphs parted by an empty line), `package` and `source`.
    The folder lies in `cache_dir` (default: $HDLIB_CACHE, else ~/.cache/hdlib); its name stands for all that
    the corpus depends on. Raises RuntimeError if there is less than `MINIMUM_BYTES` bytes of prose.
    """
    cache = Path(cache_dir or os.environ.get("HDLIB_CACHE") or Path.home() / ".cache" / "hdlib")
    packages = installed()
    folder = cache / f"documentation-{content_key(packages)}"
    if not folder.is_dir():
        documents = collect(packages)
        cache.mkdir(parents=True, exist_ok=True)
        write(documents, folder)
    return folder


def content_key(packages: Iterable[Package]) -> str:
    """A short hexadecimal name for the recipe and the versions of `packages`; no file of theirs is read."""
    facts = [RECIPE, sorted((package.name, package.version) for package in packages)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def collect(packages: Iterable[Package]) -> list[Document]:
    """All distinct prose of `packages`, in the order of the packages, their modules and their lines.

    Raises RuntimeError if that is less than `MINIMUM_BYTES` bytes of UTF-8.
    """
    sources = [module for package in packages for module in modules(package)]
    with ProcessPoolExecutor(initializer=gc.disable) as pool:  # syntax trees have no cycles to search for
        pages = pool.map(read, sources, chunksize=16)  # in the order of the sources, whichever is read first
        bar = tqdm(pages, total=len(sources), desc="gathering documentation", unit="file")
        documents = distinct(document for page in bar for document in page)
    found = sum(len(document.text.encode()) for document in documents)
    if found < MINIMUM_BYTES:
        raise RuntimeError(
            f"The documentation installed here holds {found:,} bytes of English prose, and distillation "
            f"wants at least {MINIMUM_BYTES:,}; pass the path of a local corpus instead."
        )
    return documents


def distinct(documents: Iterable[Document]) -> list[Document]:
    """The documents without the paragraphs that were said before, in an earlier one or in the same."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        fresh = []
        for paragraph in document.paragraphs:
            if (key := fingerprint(paragraph)) not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            kept.append(document._replace(paragraphs=fresh))
    return kept


def fingerprint(paragraph: str) -> str:
    """Equal for paragraphs that begin and end alike, case, punctuation, numbers and identifiers aside."""
    words = re.findall(r"[\w.]*\w", paragraph)
    plain = ["@" if IDENTIFIER.search(word) else word.lower() for word in words]
    return " ".join([*plain[:8], "...", *plain[8:][-8:]])


IDENTIFIER = re.compile(r"[\d_.]|[a-z][A-Z]")


def write(documents: Iterable[Document], folder: Path) -> None:
    """Make `folder` out of `documents`, whole or not at all; one that another process made first stays."""
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents:
        splits["validation" if is_held_out(document) else "train"].append(document)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="gathering-") as scratch:
        draft = Path(scratch, folder.name)
        draft.mkdir()
        for split, chosen in splits.items():
            rows = [{"text": each.text, "package": each.package, "source": each.source} for each in chosen]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, COLUMNS), draft / f"{split}.parquet")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


COLUMNS = pyarrow.schema([(name, pyarrow.string()) for name in ("text", "package", "source")])


def is_held_out(document: Document) -> bool:
    """Whether the document is for validation; a module falls to one side whole, and everywhere alike."""
    digest = hashlib.sha256(f"{document.package}/{document.source}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < VALIDATION_PERCENT


# ------------------------------------------------------------------------------------------ what is installed


def installed() -> list[Package]:
    """Python, and then by name the installed distributions that hdlib needs at run time, directly or not."""
    library = Path(sysconfig.get_path("stdlib"))
    distributions = [metadata.distribution(name) for name in sorted(required("hdlib"))]
    return [
        Package("python", platform.python_version(), partial(files_below, library)),
        *(Package(each.name, each.version, partial(files_of, each)) for each in distributions),
    ]


def required(root: str) -> set[str]:
    """Canonical names of the installed distributions that `root` requires, that these require, and so on."""
    reached = set()
    pending = [(name, "") for name in ([root] if find(root) else REQUIREMENTS)]
    while pending:
        name, extra = pending.pop()
        distribution = find(name)  # None if required on other platforms only
        if distribution and (name, extra) not in reached:
            reached.add((name, extra))
            for line in map(Requirement, distribution.requires or []):
                if line.marker is None or line.marker.evaluate({"extra": extra}):
                    pending += [(canonicalize_name(line.name), wanted) for wanted in ("", *line.extras)]
    return {name for name, _ in reached} - {root}


def find(name: str) -> metadata.Distribution | None:
    """The installed distribution of this name, if there is one."""
    return next(iter(metadata.distributions(name=name)), None)


def files_of(distribution: metadata.Distribution) -> list[tuple[Path, Path]]:
    """The files that the distribution's installer recorded."""
    return [(Path(file), Path(distribution.locate_file(file))) for file in distribution.files or []]


def files_below(root: Path) -> list[tuple[Path, Path]]:
    """The files in the tree at `root`."""
    return [(path.relative_to(root), path) for path in root.rglob("*.py")]


def modules(package: Package) -> list[Module]:
    """The package's own Python files, sorted by name: no tests and no copies of other packages."""
    own = [
        Module(package.name, ".".join(file.with_suffix("").parts).removesuffix(".__init__"), path)
        for file, path in package.files()
        if file.suffix == ".py" and not file.name.startswith("test_") and UNWANTED.isdisjoint(file.parts)
    ]
    return sorted(own)


# --------------------------------------------------------------------------------------- from source to prose


def read(module: Module) -> list[Document]:
    """The documents in a module, in the order of its lines; none if it is no Python of this version."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            tree = ast.parse(module.path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    said = [prose(string) for string in strings(tree)]
    return [Document(paragraphs, module.package, module.name) for paragraphs in said if paragraphs]


def strings(tree: ast.Module) -> list[str]:
    """The docstrings, and the other strings of several lines: topics, or docstrings attached by a call."""
    found = {}
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        value = node.value if isinstance(node, ast.Expr) else node
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            if value is not node or "\n" in value.value:
                found[value.lineno, value.col_offset] = value.value
        else:
            pending += [child for child in ast.iter_child_nodes(node) if may_hold_strings(child)]
    return [found[place] for place in sorted(found)]


def may_hold_strings(node: ast.AST) -> bool:
    """Whether to look into a node: expressions on one line, most of a tree, hold no long strings."""
    return isinstance(node, ast.stmt) or (isinstance(node, WRAPPABLE) and node.end_lineno > node.lineno)


WRAPPABLE = (ast.expr, ast.keyword, ast.excepthandler)


def prose(text: str) -> list[str]:
    """The paragraphs of a docstring that are running English, each on one line and without markup."""
    lines = visible(inspect.cleandoc(text).splitlines())
    return [plain for paragraph in paragraphs(lines) if is_english(plain := unmarked(paragraph))]


def visible(lines: Iterable[str]) -> Iterator[str]:
    """The lines, with empty ones in place of code, tables, underlines and directives."""
    fenced, session, literal = False, False, None  # literal: the depth of the line that announced the block
    for line in lines:
        bare, depth = line.strip(), indentation(line)
        session = bool(bare) and (session or bare.startswith((">>>", "In [")))
        if literal is not None and bare and depth <= literal:
            literal = None
        shown = not (fenced or session or literal is not None or LAYOUT.search(bare))
        if bare.startswith("```"):
            fenced, shown = not fenced, False
        elif shown and (directive := DIRECTIVE.match(bare)):
            shown = False
            literal = None if directive["name"] in SPOKEN else depth
        elif shown and bare.endswith("::"):
            literal = depth
        yield line if shown else ""


def indentation(line: str) -> int:
    """How many spaces stand before the line's text."""
    return len(line) - len(line.lstrip())


LAYOUT = re.compile(r"^[\W_]+$|^[|+].*[|+]$|[^.!?:\s] {3,}\S|^@|^<[^<>]*>$")
DIRECTIVE = re.compile(r"\.\.(?:\s+(?:(?P<name>[\w-]+)::)?.*)?$")
SPOKEN = {  # directives whose content is prose
    "admonition", "attention", "caution", "deprecated", "hint", "important", "note", "seealso", "tip",
    "topic", "versionadded", "versionchanged", "warning",
}  # fmt: skip


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join wrapped lines; an empty line, another indentation or a list item begins a new paragraph.

    An item's text and the lines that hang below it are one paragraph; its bullet, name and type go.
    """
    joined, margin, in_list, hangs = "", 0, False, False
    for line in [*lines, ""]:
        bare, depth = line.strip(), indentation(line)
        item = ITEM.match(bare)
        running = joined and depth == margin and not in_list and not bare.startswith(("-", "*", "+", ":"))
        is_item = bool(item[0]) and not running  # amid running text it is but a colon or a number
        if joined and bare and not is_item and (depth == margin or (hangs and depth > margin)):
            joined, margin, hangs = f"{joined} {bare}", depth, False
            continue
        if joined:
            yield joined
        joined, margin, in_list, hangs = bare, depth, is_item, is_item
        if is_item:
            joined = "" if item["typed"] else bare[item.end() :]


ITEM = re.compile(
    r"(?:(?:[-*+•]|\(?(?:\d{1,2}|[a-zA-Z])[.)])\s+)?"  # a bullet or number, and perhaps a name:
    r"(?::[^:`]+:(?:\s+|$)"  # :param count:
    r"|(?P<typed>[*`\w., ]{1,60} :(?:\s+|$))"  # count, size : int
    r"|[*`]{0,2}[\w.]+[*`]{0,2}(?:\s*\(.*?\))?(?:\s*:| --?)(?:\s+|$))?"  # count (int):
)


def unmarked(paragraph: str) -> str:
    """The paragraph without markup, and without the sentences that an address or a formula interrupts."""
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    sentences = SENTENCE_END.split(paragraph)
    return " ".join(sentence for sentence in sentences if not UNSPEAKABLE.search(sentence)).strip()


MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"!?\[([^\[\]]+)\]\([^()\s]*\)", r"\1"),  # [text](address)
        (r"(?<!\w)\[([^\[\]]+)\] ?\[[^\[\]]*\]", r"\1"),  # [text][label]
        (r":[\w:+-]+:(?=`)", ""),  # :role:`text`
        (r"`([^`<>]+?)\s*<[^`<>]+>`_{0,2}", r"\1"),  # `text <address>`_
        (r"\[(`+[^`\]]+`+)\]", r"\1"),  # [`Name`]
        (r"\s*\[[\w*#]+\]_", ""),  # [1]_
        (r"(?<![\w`])(`{1,2})[~!]?([^`\s](?:[^`]*[^`\s])?)\1_{0,2}(?!\w)", r"\2"),  # ``code``
        (r"(?<![\w*])(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?![\w*])", r"\2"),  # **strong**
        (r"::$", ":"),
        (r"\s+", " "),
    )
]
SENTENCE_END = re.compile(r"(?<=[.!?])(?<![ie]\.[eg]\.) (?=[^a-z])")  # but not after "i.e." or "e.g."
UNSPEAKABLE = re.compile(r"://|www\.|[\\{}`|$<>=]|%[(sdrf]")


def is_english(paragraph: str) -> bool:
    """Whether this is a whole sentence of English or several, and neither a licence nor an enumeration."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    common = [word for word in words if word in COMMON]
    return (
        len(words) >= 8
        and len(common) >= len(words) / 5
        and len(set(common)) >= 3
        and sum(map(len, words)) >= 0.88 * len(paragraph.replace(" ", ""))
        and SENTENCE.match(paragraph) is not None
        and LEGAL.search(paragraph) is None
    )


COMMON_WORDS = """
    a about after all also an and any are as at be been before between but by can do does each for from had
    has have if in into is it its may more must no not of on one only or other over same should so some such
    than that the their them then there these they this to until up use used was we were what when where
    whether which while will with without would you your
"""
COMMON = frozenset(COMMON_WORDS.split())
SENTENCE = re.compile(r"[A-Z0-9\"'(].*[.!?:][\"')]*$")
LEGAL = re.compile(r"copyright|licen[sc]e|warrant(y|ies)|redistribut", re.IGNORECASE)
