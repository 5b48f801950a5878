"""The embedded corpus: prose without repetitions, split by module, reproducible, written completely or not at all."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from hdlib.text import documentation
from hdlib.text.documentation import gather, prose, read, required, sources

SHARED = "This sentence is in each of the modules, and the corpus must contain it once."


def sentences() -> list[str]:
    """Two hundred sentences that differ in whole words, because numbers do not distinguish paragraphs."""
    animals = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    colours = ["red", "green", "blue", "white", "black"]
    places = ["garden", "river", "forest", "desert"]
    return [
        f"The {a} that is {c} has lived in the {p} for all of its life."
        for a, c, p in product(animals, colours, places)
    ]


def install(site: Path, name: str, *requirements: str, version: str = "1", files: tuple[str, ...] = ()) -> None:
    folder = site / f"{name}-1.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requirements)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """One installed package of a hundred modules, each with the shared sentence and two others; no standard library."""
    site, files, told = tmp_path / "site", [], sentences()
    for number in range(100):
        files.append(f"fake/part{number % 7}/module{number}.py")
        path = site / files[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        one, two = told[2 * number : 2 * number + 2]
        path.write_text(f'"""{one}\n\n{SHARED}\n"""\n\n\ndef act():\n    """{two}"""\n')
    install(site, "zz_fake", files=tuple(files))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(documentation, "PACKAGES", ["zz-fake"])
    monkeypatch.setattr(documentation, "MINIMUM_BYTES", 1000)
    monkeypatch.setattr(documentation.sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    return site


def parts(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_parquet(folder / "train.parquet"), pd.read_parquet(folder / "validation.parquet")


def paragraphs(part: pd.DataFrame) -> list[str]:
    return [paragraph for text in part["text"] for paragraph in text.split("\n\n")]


# ------------------------------------------------------------------------------------------------------ prose

CODE = """
    The sum of the two numbers is returned
    to the caller, for example::

        total = add(first, second)

    >>> add(1, 2)
    3
    >>> for i in range(3):
    ...     print(i)

    ```python
    model = load("the name of the model")
    ```
    .. note:: 5.1

        A note is made of words that are for the reader.
    """
NUMPYDOC = """
    Parameters
    ----------
    x, y : array_like of shape (n, 2) or None, default=None
        The points at which the function
        is to be evaluated.
    axis : None or int or tuple of ints as in the other functions, optional.
        Axis over which the mean is taken.
        By default it is the last one.

    Returns
    -------
    ndarray
        The values of the function at each of the points.
    """
GOOGLE_AND_SPHINX = """
    Args:
        size (`int` of any kind, *optional*): The number of units in
            the layer that is made.
        rate (float):
            The share of the units that is dropped at each step.
    :param name: The name of the layer in the model that is made.
    :param int depth: The number of layers that are put one on the other.
    """
LIST = """
    - The first of the items is here and it continues
      on the next line.
    - The second of the items is all in one line.
    2. The third one is of another kind than the others.
    """


EXPECTED = {
    CODE: """The sum of the two numbers is returned to the caller, for example:
A note is made of words that are for the reader.""",
    NUMPYDOC: """The points at which the function is to be evaluated.
Axis over which the mean is taken. By default it is the last one.
The values of the function at each of the points.""",
    GOOGLE_AND_SPHINX: """The number of units in the layer that is made.
The share of the units that is dropped at each step.
The name of the layer in the model that is made.
The number of layers that are put one on the other.""",
    LIST: """The first of the items is here and it continues on the next line.
The second of the items is all in one line.
The third one is of another kind than the others.""",
}


@pytest.mark.parametrize("text", EXPECTED, ids=["code", "numpydoc", "Google and Sphinx", "list"])
def test_prose_is_found_in_every_layout(text):
    assert "\n".join(prose(text)) == EXPECTED[text]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("``code``", "code"),
        ("`code`", "code"),
        (":class:`~torch.nn.Module`", "torch.nn.Module"),
        (":py:func:`the sum <torch.sum>`", "the sum"),
        ("[`BertModel`]", "BertModel"),
        ("**strong** and *weak*", "strong and weak"),
        ("[the paper](https://arxiv.org/abs/1)", "the paper"),
        ("`the site <https://python.org>`_", "the site"),
        ("a * b * c", "a * b * c"),
        ("value [1]_", "value"),
    ],
)
def test_prose_has_no_markup(marked, plain):
    assert list(prose(f"All that is written of {marked} in this one is true.")) == [
        f"All that is written of {plain} in this one is true."
    ]


def test_only_the_sentence_with_an_address_or_a_formula_is_dropped():
    text = "The text has sentences. See the one at https://python.org for more. The last one is kept. It is x=3."
    assert list(prose(text)) == ["The text has sentences. The last one is kept."]


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be of use.",
        "x : int or float, the default of it is that of the others",
        "Choices are the following: numpy, scipy, torch, pandas, matplotlib, accelerate, networkx or "
        "pyarrow, requests, jinja, tornado, pygments.",
        "Die Werte werden in einer Liste gespeichert und danach an die Funktion weitergegeben.",
        "and this is the tail of a sentence that has begun elsewhere.",
        "This is the head of a sentence that is to end in the",
        "Permission is given to use this under the licence that is in the file.",
        "Of the (1, 2, 3), (4, 5, 6), (7, 8, 9) and (10, 11, 12, 13) it is the [14, 15, 16] to do.",
    ],
)
def test_other_text_is_refused(text):
    assert list(prose(text)) == []


# ----------------------------------------------------------------------------------------------------- sources


def test_docstrings_and_long_strings_are_read_and_broken_files_are_not(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'class A:\n    "What a docstring of one line says is kept for the reader."\n\n\n'
        'attach(A, """\nWhat a string of many lines says is kept for the reader, too.\n""")\n'
        'raise ValueError(\n    "What a message of one line "\n    "says is not kept for the reader."\n)\n'
    )
    assert {row[-1] for row in read("fake", "module", path)} == {
        "What a docstring of one line says is kept for the reader.",
        "What a string of many lines says is kept for the reader, too.",
    }
    path.write_text("def broken(:")
    assert read("fake", "module", path) == [] == read("fake", "module", tmp_path / "missing.py")


def test_tests_and_copies_of_other_packages_are_not_read(tmp_path, monkeypatch):
    for name in "b.py", "a/__init__.py", "a/c.py", "a/tests/d.py", "a/_vendor/e.py", "test_f.py", "g.txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(documentation.sysconfig, "get_path", lambda _: str(tmp_path))
    assert [module for _, module, _ in sources({})] == ["a", "a.c", "b"]


def test_requirements_are_followed_with_their_markers(tmp_path, monkeypatch):
    install(tmp_path, "zz_root", "zz-middle>=0", "zz-old; python_version < '3'", "zz-dev; extra == 'dev'", "zz-missing")
    install(tmp_path, "zz_middle", "zz_leaf", "zz_root")
    for name in "zz_leaf", "zz_old", "zz_dev", "zz_unrelated":
        install(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(required(["zz-root"])) == {"zz_root", "zz_middle", "zz_leaf"}


# -------------------------------------------------------------------------------------------------- the corpus


def test_every_paragraph_is_in_one_part_once_and_every_module_in_one_part(site, tmp_path):
    train, validation = parts(gather(tmp_path / "cache"))
    assert sorted(paragraphs(train) + paragraphs(validation)) == sorted([*sentences(), SHARED])
    assert 0 < len(validation) < len(train) / 5
    modules = set(train["source"]), set(validation["source"])
    assert modules[0].isdisjoint(modules[1]) and len(modules[0] | modules[1]) == 100
    assert "fake.part0.module0" in modules[0] | modules[1] and set(train["package"]) == {"zz_fake"}


def test_paragraphs_that_differ_in_names_and_numbers_are_repetitions(tmp_path, monkeypatch):
    monkeypatch.setattr(documentation, "MINIMUM_BYTES", 0)
    first, again = "The model of BertModel is made for 12 heads.", "The model of LlamaModel is made, for 16 heads."
    other = "The words of this one are not those of the first."
    rows = [("p", "a", 0, first), ("p", "b", 0, again), ("p", "b", 0, other), ("p", "c", 0, first)]
    documentation.write(rows, tmp_path / "corpus")
    both = pd.concat(parts(tmp_path / "corpus")).sort_values("source")
    assert both[["source", "text"]].to_numpy().tolist() == [["a", first], ["b", other]]


def test_the_order_of_the_files_does_not_matter(site, tmp_path):
    first = gather(tmp_path / "first")
    record = site / "zz_fake-1.dist-info" / "RECORD"
    record.write_text("\n".join(record.read_text().splitlines()[::-1]) + "\n")
    second = gather(tmp_path / "second")
    assert first.name == second.name
    for one, two in zip(parts(first), parts(second), strict=True):
        pd.testing.assert_frame_equal(one, two)


def test_the_sources_are_read_again_when_a_version_or_the_recipe_changes(site, tmp_path, monkeypatch):
    folder = gather(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(documentation, "sources", lambda _: pytest.fail("the sources were listed again"))
        assert gather(tmp_path) == folder
    files = tuple(line.split(",")[0] for line in (site / "zz_fake-1.dist-info" / "RECORD").read_text().splitlines())
    install(site, "zz_fake", version="1.1", files=files)
    changed = gather(tmp_path)
    monkeypatch.setattr(documentation, "RECIPE", "another")
    assert len({folder, changed, gather(tmp_path)}) == 3


def test_the_cache_is_where_the_environment_variable_says(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HDLIB_CACHE", str(tmp_path / "elsewhere"))
    assert gather().parent == tmp_path / "elsewhere"


def test_a_corpus_that_was_interrupted_is_made_again(site, tmp_path, monkeypatch):
    whole = pd.DataFrame.to_parquet

    def stop_at_validation(self, path, **options):
        if path.stem == "validation":
            raise OSError("no space left")
        whole(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", stop_at_validation)
        with pytest.raises(OSError, match="no space left"):
            gather(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("documentation-????????????????"))
    assert len(parts(gather(tmp_path / "cache"))[1])


def test_too_little_documentation(site, tmp_path, monkeypatch):
    monkeypatch.setattr(documentation, "MINIMUM_BYTES", 10**9)
    with pytest.raises(RuntimeError, match=r"has \d\d,\d{3} bytes of prose, fewer than 1,000,000,000: use a local"):
        gather(tmp_path / "cache")


def test_the_installed_documentation_suffices():
    train, validation = parts(gather())
    size, held_out = (sum(len(text.encode()) for text in part["text"]) for part in (train, validation))
    assert size + held_out >= 8_000_000 and 0.02 < held_out / (size + held_out) < 0.06
    assert set(paragraphs(train)).isdisjoint(paragraphs(validation))
    assert {"pydoc_data.topics", "torch._torch_docs"} <= set(train["source"]) | set(validation["source"])
    assert list(train) == ["text", "package", "source"]
