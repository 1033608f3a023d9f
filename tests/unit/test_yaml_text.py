"""YAML is read strictly: a key stands once, mistakes have a line, and what is written is read back as it was."""

from __future__ import annotations

import pytest
import yaml

from fastlt.recipe import RecipeError, load_recipe
from fastlt.recipe.yaml_text import dump, parse

RECIPE = """\
data: {source: digits, image_size: 8, mean: [0.3, 0.3, 0.3], std: [0.4, 0.4, 0.4]}
model: {name: cifar_resnet8}
stages:
  train: {method: plain, lr: 0.1, iterations: 600}
seed: 1
"""
# Nine times as many values a line.
MANY_ALIASES = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
NOT_UTF8 = "/images/\udcff"  # as Python hands over an argument or a file name
ODD_TEXTS = ["1e4", "010", "2001-01-01", "1:30", "~", "no", "<<", "=", "a: b", "é", "", "'", "0x1F"]


def refusal(text: str, key: str = "") -> str:
    with pytest.raises(RecipeError) as error:
        parse(text, "mine.yaml", key)
    return str(error.value)


def test_a_key_given_twice_is_refused_with_both_lines_at_every_depth():
    told = refusal("stages:\n  train: {lr: 1}\n  train: {lr: 2, gamma: 1,\n    gamma: 2}\nseed: 1\nseed: 2\n")
    assert sorted(told.splitlines(), reverse=True) == [
        "stages.train: is given twice, on lines 2 and 3 of mine.yaml; leave one of them out",
        "stages.train.gamma: is given twice, on lines 3 and 4 of mine.yaml; leave one of them out",
        "seed: is given twice, on lines 5 and 6 of mine.yaml; leave one of them out",
    ]
    assert "augment[0].flip.p: is given twice" in refusal("augment: [{flip: {p: 1, p: 2}}]")
    assert "1: is given twice" in refusal("1: a\n'1': b"), "keys are names"


def test_a_key_given_twice_is_found_in_base_files_and_words_too(tmp_path):
    (tmp_path / "low.yaml").write_text(RECIPE + "seed: 2\n")
    (tmp_path / "mine.yaml").write_text("base: [low.yaml]\n")
    with pytest.raises(RecipeError, match=r"seed: is given twice, on lines 5 and 6 of .*low\.yaml"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "low.yaml").write_text(RECIPE)
    assert load_recipe(tmp_path / "mine.yaml").seed == 1
    with pytest.raises(RecipeError, match=r"model\.name: is given twice, on lines 1 and 1"):
        load_recipe(tmp_path / "mine.yaml", ["model={name: a, name: b}"])


def test_own_keys_lie_on_top_of_merged_ones_but_merged_ones_do_not_hide_each_other():
    assert parse("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}", "f")["b"] == {"x": 1, "y": 2}
    assert parse("a: &a {x: 1}\nb: &b {y: 1}\nc: {<<: [*a, *b]}", "f")["c"] == {"x": 1, "y": 1}
    assert "c.<<: line 3 of mine.yaml: merges two mappings that both have the key x" in refusal(
        "a: &a {x: 1}\nb: &b {x: 2}\nc: {<<: [*a, *b]}"
    )
    assert "b.<<: is given twice" in refusal("a: &a {x: 1}\nb: {<<: *a, <<: {x: 2}}")
    assert "b.<<.x: is given twice" in refusal("b: {<<: {x: 1, x: 2}}")
    assert "merges what is no mapping" in refusal("b: {<<: 1}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n\tb: 2", "line 2: "),
        ("a: [1", "line 1: "),
        ("a: 1\nb: \x07", "line 2: text has no '\\x07'"),
        ("a: *b", "line 1: found undefined alias"),
        ("a: 1\n---\nb: 2", "line 2: "),
        ("? [a]\n: 1", "line 1 of mine.yaml: has a key that is a list or a mapping"),
        ("a: 1\nb: !!timestamp 2001-01-01", "b: line 2 of mine.yaml: has the tag"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + MANY_ALIASES, "more than 100,000 values"),
        ("a: &a {b: *a}", "more than 50 levels"),
    ],
    ids=range(10),
)
def test_a_text_that_is_no_recipe_is_refused_with_its_line(text, expected):
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds nothing"),
        (b"- 1", "a list"),
        (b"seed: 1\nname: \xff", "line 2 is not UTF-8"),
        (RECIPE.encode("utf-16"), "is not UTF-8"),
        (b"x" * (2 << 20), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, expected):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path)


def test_a_folder_is_no_recipe_and_a_byte_order_mark_is_no_mistake(tmp_path):
    with pytest.raises(RecipeError, match="is a folder; give the path of a recipe file"):
        load_recipe(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert load_recipe(path).seed == 1


def test_numbers_are_as_they_look():
    values = parse("[10, 010, 1e-4, 1_000, .5, -2., .inf, 2001-01-01, 0x1F, 1:30, ~, no, =]", "f")
    assert values[:5] == [10, 10, 1e-4, 1000, 0.5]
    assert values[5:] == [-2.0, float("inf"), "2001-01-01", "0x1F", "1:30", None, False, "="]


@pytest.mark.parametrize(
    "text", ["1e4", "010", "2001-01-01", "1:30", "~", "no", "<<", "=", "a: b", "é", "", "'", "0x1F"]
)
def test_what_is_written_is_read_back_also_by_others(text):
    tree = {"key": text, "path": NOT_UTF8, "list": [text, 1, 1e-5, None, True]}
    assert parse(dump(tree), "f") == tree == yaml.safe_load(dump(tree))
    assert parse(NOT_UTF8, "f") == NOT_UTF8
