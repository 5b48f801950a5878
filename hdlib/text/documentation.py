"""An English corpus made of the documentation on this machine: docstrings, and the topics of `pydoc_data`.

The files of the standard library and of the packages that hdlib requires are parsed, not imported.
"""

import ast
import gc
import hashlib
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm.auto import tqdm

RECIPE = 3  # raise it when a change in this file changes the text
MINIMUM_BYTES = 8_000_000
PACKAGES = ["accelerate", "datasets", "ipywidgets", "jupyterlab", "matplotlib", "scikit-learn", "transformers"]
NOT_READ = {"test", "tests", "idle_test", "_vendor", "_vendored", "site-packages", "dist-packages"}
MARKUP = {  # pattern: replacement
    r"(?m)^ *(?:(?:[^\w\n]|_)+|[*`\w., ]{1,60} :(?: .*)?)$": "",  # a line without letters, or with a name and its type
    r"(?m)::$": ":",
    r"!?(?<!\w)\[([^\[\]]+)\](?:\([^()\s]*\)| ?\[[^\[\]]*\])": r"\1",  # [text](address), [text][label]
    # :role:`text`, `text <address>`_, [1]_, [`name`]
    r":[\w:+-]+:(?=`)|\s+<[^<>]*>(?=`)|\s*\[[\w*#]+\]_|\[?`+(?:[~!]|_{1,2}(?!\w)|\])?": "",
    r"(?<![\w*])(\*{1,2})([^*\s](?:[^*\n]*\n?[^*\n]*[^*\s])?)\1(?![\w*])": r"\2",  # **strong**
}
ITEM = re.compile(  # a bullet or number; then :param count: or count (int):
    r"(?:(?:[-*+•]|\(?(?:\d{1,2}|[a-zA-Z])[.)])\s+)?(?::[^:]+:(?:\s+|$)|\*{0,2}[\w.]+(?:\s*\(.*?\))?\s*:(?:\s+|$))?"
)
NO_PROSE = re.compile(r"://|www\.|[\\{}`|$<>=]|%[(sdrf]|(?i:copyright|licen[sc]e|warrant|redistribut)")
COMMON = re.compile(
    r"\b(?:an?|and|are|as|at|be|but|by|can|do|does|for|from|ha[sv]e?|if|in|is|its?|may|must|not|of|on|one|only|or|other"
    r"|should|that|the|their|them|these|they|this|to|used?|was|we|when|where|which|will|with|you|your)\b"
)


def gather(cache_dir: Path | None = None) -> Path:
    """Return the folder with `train.parquet` and `validation.parquet`. The first call makes it.

    Columns: `text` (one docstring, an empty line between paragraphs), `package`, and `source`, the module's name.
    The folder is in `cache_dir` (default: $HDLIB_CACHE, else ~/.cache/hdlib); its name depends on the versions of
    Python and of the packages. Raises RuntimeError for less than `MINIMUM_BYTES` bytes of prose.
    """
    cache = Path(cache_dir or os.environ.get("HDLIB_CACHE") or "~/.cache/hdlib").expanduser()
    packages = required(PACKAGES)
    facts = RECIPE, platform.python_version(), sorted((name, each.version) for name, each in packages.items())
    folder = cache / f"documentation-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            files = sources(packages)
            with ProcessPoolExecutor(initializer=gc.disable) as pool:  # syntax trees contain no cycles
                found = tqdm(pool.map(read, *zip(*files, strict=True), chunksize=16), "gathering text", len(files))
                write([row for rows in found for row in rows], folder)
    return folder


def required(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions of these names and all that they require, by name."""
    found, pending = {}, list(names)
    for name in map(canonicalize_name, pending):  # the list grows meanwhile
        installed = next(iter(metadata.distributions(name=name)), None)  # None: required on other platforms only
        if installed and name not in found:
            found[name] = installed
            needs = map(Requirement, installed.requires or [])
            pending += [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    return {package.name: package for package in found.values()}


def sources(packages: dict[str, metadata.Distribution]) -> list[tuple[str, str, Path]]:
    """(package, module, path) of the Python files of the standard library and of the packages, sorted."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [("python", path.relative_to(library), path) for path in library.rglob("*.py")]
    for name, package in packages.items():
        files += [(name, Path(file), Path(file.locate())) for file in package.files or []]
    return sorted(
        (package, ".".join(file.with_suffix("").parts).removesuffix(".__init__"), path)
        for package, file, path in files
        if file.suffix == ".py" and not file.name.startswith("test_") and NOT_READ.isdisjoint(file.parts)
    )


def read(package: str, module: str, path: Path) -> list[tuple[str, str, int, str]]:
    """(package, module, number, paragraph) of each docstring and each other string of several lines in a file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes
            nodes: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError, OSError):  # templates, and files for another version of Python
        return []
    rows = []
    for number, node in enumerate(nodes):  # the list grows meanwhile
        value = node.value if isinstance(node, ast.Expr) else node
        if isinstance(value, ast.Constant):
            if isinstance(value.value, str) and (value is not node or "\n" in value.value):
                rows += [(package, module, number, paragraph) for paragraph in prose(value.value)]
        elif isinstance(node, (ast.Module, ast.stmt)) or getattr(node, "lineno", 0) < getattr(node, "end_lineno", 0):
            nodes += ast.iter_child_nodes(node)
    return rows


def write(rows: list[tuple[str, str, int, str]], folder: Path) -> None:
    """Drop repetitions and write both parts, each module to one of them. The folder gets its name when complete."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=["package", "source", "number", "text"])
    words = table["text"].str.findall(r"\b[a-z]+\b")  # no names and numbers
    table = table[~(words.str[:8] + words.str[-8:]).str.join(" ").duplicated()]
    if (size := sum(len(text.encode()) for text in table["text"])) < MINIMUM_BYTES:
        raise RuntimeError(
            f"the installed documentation has {size:,} bytes of prose, fewer than {MINIMUM_BYTES:,}: use a local corpus"
        )
    table = table.groupby(["package", "source", "number"])["text"].agg("\n\n".join).reset_index()
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in table["package"] + "/" + table["source"]]
    held_out = pd.Series([int(digest[:8], 16) % 100 < 4 for digest in digests])  # 4 % of the modules
    draft = folder.with_suffix(".draft")
    draft.mkdir(exist_ok=True)
    for name, part in {"train": table[~held_out], "validation": table[held_out]}.items():
        part[["text", "package", "source"]].to_parquet(draft / f"{name}.parquet", index=False)
    draft.rename(folder)


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a docstring that are running English, each on one line and without markup."""
    text = inspect.cleandoc(text)
    for pattern, replacement in MARKUP.items():
        text = re.sub(pattern, replacement, text)
    for paragraph in paragraphs(text):
        sentences = re.split(r"(?<=[.!?])(?<![ie]\.[eg]\.) (?=[^a-z])", paragraph)
        if is_english(plain := " ".join(each for each in sentences if not NO_PROSE.search(each))):
            yield plain


def paragraphs(text: str) -> Iterator[str]:
    """Join wrapped lines. An empty line, another indentation or a list item starts a paragraph."""
    joined, margin, in_list = "", 0, False
    for line in [*text.splitlines(), ""]:
        bare, depth = " ".join(line.split()), len(line) - len(line.lstrip())
        item = ITEM.match(bare).end()
        if joined and bare and not item and (depth == margin or (in_list and depth > margin)):
            joined, margin = f"{joined} {bare}", depth
        else:
            yield joined
            joined, margin, in_list = bare[item:], depth, item > 0


def is_english(paragraph: str) -> bool:
    """Whether these are whole sentences of English, and neither a licence nor an enumeration."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    is_text = sum(map(len, words)) >= 0.88 * len(paragraph.replace(" ", ""))
    is_whole = len(words) >= 8 and re.fullmatch(r"[A-Z0-9\"'(].*[.!?:][\"')]*", paragraph)
    return bool(is_text and is_whole and len(COMMON.findall(paragraph.lower())) >= max(3, len(words) / 5))
