"""The corpus is prose, said once, split by module, the same each time, and there whole or not at all."""

from functools import partial
from itertools import product
from pathlib import Path

import pyarrow.parquet
import pytest

from hdlib.text import documentation
from hdlib.text.documentation import Document, Package, distinct, files_below, gather, prose

SHARED = "This sentence stands in each of the modules, and it has to come out of only one."


def sentences() -> list[str]:
    """Two hundred sentences that differ in whole words, as numbers alone would not tell them apart."""
    animals = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    colours = ["red", "green", "blue", "white", "black"]
    places = ["garden", "river", "forest", "desert"]
    words = product(animals, colours, places)
    return [f"The {a} that is {c} has lived in the {p} for all of its life." for a, c, p in words]


def plant(root: Path) -> Package:
    """A package of a hundred modules, each with a sentence they share and two of its own."""
    told = sentences()
    for number in range(100):
        own = told[2 * number : 2 * number + 2]
        path = root / "tree" / f"part{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{own[0]}\n\n{SHARED}\n"""\n\n\ndef act():\n    """{own[1]}"""\n')
    return Package("fake", "1.0", partial(files_below, root))


@pytest.fixture
def package(tmp_path, monkeypatch) -> Package:
    """The planted package, as the only one installed."""
    planted = plant(tmp_path / "site")
    monkeypatch.setattr(documentation, "MINIMUM_BYTES", 1000)
    monkeypatch.setattr(documentation, "installed", lambda: [planted])
    return planted


def rows(folder: Path, split: str) -> list[dict]:
    return pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()


def said(folder: Path, split: str) -> list[str]:
    return [paragraph for row in rows(folder, split) for paragraph in row["text"].split("\n\n")]


# ------------------------------------------------------------------------------------------------------ prose


def test_prose_joins_wrapped_lines_and_parts_paragraphs():
    text = """Return the value that was put
        into the box before.

        It is an error to ask for a value that
        is not there.
        """
    assert prose(text) == [
        "Return the value that was put into the box before.",
        "It is an error to ask for a value that is not there.",
    ]


def test_prose_drops_doctests_with_their_output():
    text = """The sum of the two numbers is returned to the caller.

        >>> add(1, 2)
            This is what the session prints as an answer, and it is not to be kept.
        >>> for i in range(3):
        ...     print('the value of this is what is in it')

        After the session the text goes on as it did before.
        """
    assert prose(text) == [
        "The sum of the two numbers is returned to the caller.",
        "After the session the text goes on as it did before.",
    ]


def test_prose_keeps_the_descriptions_of_numpydoc_parameters():
    text = """
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
    assert prose(text) == [
        "The points at which the function is to be evaluated.",
        "Axis over which the mean is taken. By default it is the last one.",
        "The values of the function at each of the points.",
    ]


def test_prose_keeps_the_descriptions_of_google_and_sphinx_parameters():
    text = """
        Args:
            size (`int` of any kind, *optional*): The number of units in
                the layer that is made.
            rate (float):
                The share of the units that is dropped at each step.
        :param name: Under which the layer is to be found later.
        :param int depth: The number of layers that are put one on the other.
        """
    assert prose(text) == [
        "The number of units in the layer that is made.",
        "The share of the units that is dropped at each step.",
        "Under which the layer is to be found later.",
        "The number of layers that are put one on the other.",
    ]


def test_prose_gives_each_list_item_a_paragraph():
    text = """
        - The first of the items is here and it goes
          on in the next line.
        - The second of the items is all in one line.
        2. The third one is of another kind than the others.
        """
    assert [item.split()[1] for item in prose(text)] == ["first", "second", "third"]


def test_prose_drops_literal_blocks_and_fences():
    text = """
        An underlined title
        ~~~~~~~~~~~~~~~~~~~
        An example of how it is used is in the lines below::

            The block is not to be seen, for it is what a program says.

            Nor is the second paragraph of it to be seen by anyone.

        Here the text is as it was before the block.

        ```python
        The fence hides what is in it, and this is what it does.
        ```
        .. code-block:: python

            The directive hides what is in it, and this is what it does.

        .. note:: 5.1

            A note is made of words that are for the reader.
        """
    assert prose(text) == [
        "An example of how it is used is in the lines below:",
        "Here the text is as it was before the block.",
        "A note is made of words that are for the reader.",
    ]


def test_prose_drops_tables_below_their_captions():
    text = """The names of all the functions are in the table below:
        | name | purpose |
        |:-----|:--------|"""
    assert prose(text) == ["The names of all the functions are in the table below:"]


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
def test_prose_takes_off_markup(marked, plain):
    assert prose(f"All that is said of {marked} in this one is true.") == [
        f"All that is said of {plain} in this one is true."
    ]


def test_prose_drops_only_the_sentence_with_an_address_or_formula():
    text = """Sentences of mere words stay in the text, i.e. URLs go. See, e.g. The one at https://python.org
        for more. The last sentence stands as it did before. It is x=3."""
    assert prose(text) == [
        "Sentences of mere words stay in the text, i.e. URLs go. The last sentence stands as it did before."
    ]


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
        "The name of it    and what it is for    are in the columns of a table.",
    ],
)
def test_prose_refuses_what_is_no_running_english(text):
    assert prose(text) == []


# ------------------------------------------------------------------------------------------- the whole corpus


def test_distinct_keeps_the_first_of_what_is_said_twice():
    first = "The model of BertModel is made for 12 heads."
    other = "The words of this one are not those of the first."
    again = "The  Model of LlamaModel is made, for 16 heads."
    repeated = {"a": [first, again], "b": [again, other], "c": [first]}
    documents = [Document(paragraphs, "fake", source) for source, paragraphs in repeated.items()]
    assert distinct(documents) == [Document([first], "fake", "a"), Document([other], "fake", "b")]


def test_modules_are_named_sorted_and_neither_tests_nor_copies(tmp_path):
    for name in "b.py", "a/__init__.py", "a/c.py", "a/tests/d.py", "a/_vendor/e.py", "test_f.py", "g.txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = documentation.modules(Package("fake", "1.0", partial(files_below, tmp_path)))
    assert [module.name for module in found] == ["a", "a.c", "b"]


def test_read_takes_docstrings_and_long_strings_and_survives_broken_files(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'class A:\n    "What a docstring of one line says is kept for the reader."\n\n\n'
        'attach(A, """\nWhat a string of many lines says is kept for the reader, too.\n""")\n'
        'raise ValueError(\n    "What a message of one line "\n    "says is not kept for the reader."\n)\n'
    )
    module = documentation.Module("fake", "module", path)
    kept = ["docstring of one line", "string of many lines"]
    assert [document.text for document in documentation.read(module)] == [
        f"What a {kept[0]} says is kept for the reader.",
        f"What a {kept[1]} says is kept for the reader, too.",
    ]
    path.write_text("def broken(:")
    assert documentation.read(module) == []


def test_gather_says_everything_once_and_splits_by_module(package, tmp_path):
    folder = gather(tmp_path / "cache")
    train, validation = said(folder, "train"), said(folder, "validation")
    assert sorted(train + validation) == sorted([*sentences(), SHARED])
    assert 0 < len(validation) < len(train) / 5
    sources = [{row["source"] for row in rows(folder, split)} for split in ("train", "validation")]
    assert sources[0].isdisjoint(sources[1]) and len(sources[0] | sources[1]) == 100
    assert {row["package"] for row in rows(folder, "train")} == {"fake"}
    assert "tree.part0.module0" in sources[0] | sources[1]


def test_gather_is_the_same_whatever_the_order_of_the_files(package, tmp_path, monkeypatch):
    first = gather(tmp_path / "first")
    reverse = package._replace(files=lambda: files_below(tmp_path / "site")[::-1])
    monkeypatch.setattr(documentation, "installed", lambda: [reverse])
    second = gather(tmp_path / "second")
    assert first.name == second.name
    for split in "train", "validation":
        assert rows(first, split) == rows(second, split)


def test_gather_reads_no_source_again_until_a_version_changes(package, tmp_path, monkeypatch):
    folder = gather(tmp_path)
    unreadable = package._replace(files=lambda: pytest.fail("the sources were listed again"))
    monkeypatch.setattr(documentation, "installed", lambda: [unreadable])
    assert gather(tmp_path) == folder
    monkeypatch.setattr(documentation, "installed", lambda: [package._replace(version="1.1")])
    assert gather(tmp_path) != folder
    monkeypatch.setattr(documentation, "installed", lambda: [package])
    monkeypatch.setattr(documentation, "RECIPE", "another")
    assert gather(tmp_path) != folder


def test_gather_honours_the_environment_variable(package, tmp_path, monkeypatch):
    monkeypatch.setenv("HDLIB_CACHE", str(tmp_path / "elsewhere"))
    assert gather().parent == tmp_path / "elsewhere"


def test_gather_that_fails_leaves_nothing(package, tmp_path, monkeypatch):
    whole = pyarrow.parquet.write_table

    def stop_at_validation(table, path):
        if path.stem == "validation":
            raise OSError("no space left")
        whole(table, path)

    monkeypatch.setattr(pyarrow.parquet, "write_table", stop_at_validation)
    with pytest.raises(OSError, match="no space left"):
        gather(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_write_leaves_alone_what_another_process_made_first(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.parquet").write_text("theirs")
    documentation.write([Document(["ours"], "p", "a")], folder)
    assert (folder / "train.parquet").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


def test_gather_tells_how_little_it_found(package, tmp_path, monkeypatch):
    monkeypatch.setattr(documentation, "MINIMUM_BYTES", 10**9)
    with pytest.raises(RuntimeError, match=r"holds \d\d,\d{3} bytes.*1,000,000,000.*path of a local corpus"):
        gather(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_required_follows_extras_and_markers_and_nothing_else(tmp_path, monkeypatch):
    def install(name, *lines):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        metadata = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {line}" for line in lines)]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(metadata) + "\n")

    elsewhere = ["zz-old; python_version < '3'", "zz-dev; extra == 'dev'", "zz-missing"]
    install("zz_root", "zz-middle[more]>=0", *elsewhere)
    install("zz_middle", "zz_leaf; extra == 'more'", "zz_root")
    for name in "zz_leaf", "zz_old", "zz_dev", "zz_unrelated":
        install(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert documentation.required("zz-root") == {"zz-middle", "zz-leaf"}


def test_the_installed_documentation_suffices():
    folder = gather()
    train, validation = rows(folder, "train"), rows(folder, "validation")
    size = {id(split): sum(len(row["text"].encode()) for row in split) for split in (train, validation)}
    assert sum(size.values()) >= 8_000_000
    assert 0.02 < size[id(validation)] / sum(size.values()) < 0.06
    assert set(said(folder, "train")).isdisjoint(said(folder, "validation"))
    assert {"pydoc_data.topics", "torch._torch_docs"} <= {row["source"] for row in train + validation}
    assert set(train[0]) == {"text", "package", "source"} and train[0]["package"] == "python"
