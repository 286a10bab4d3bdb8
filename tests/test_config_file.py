"""Mistakes in a config file are one sentence that names the flag and, if known, the line."""

import pytest

from moe_jax.config_file import load_config
from moe_jax.errors import UserError

HEAD = """import sys
from ml_collections import ConfigDict, FrozenConfigDict, config_dict
from moe_jax.config import default_config
"""
RETURNS = "def get_config(): return "
SETS = """def get_config():
    config = default_config()
    config.{}
    return config
"""

# name of the mistake -> (the file after HEAD, a pattern of the sentence)
FILES = {
    "an exit with 0": ("def get_config(): sys.exit(0)", "line 4 exits with 0"),
    "an exit on import": ("sys.exit()", "line 4 exits with None"),
    "an exit with a text": ("\nraise SystemExit('bye')", "line 5 exits with 'bye'"),
    "arguments of its own": (
        "import argparse\nargparse.ArgumentParser().parse_args(['--x'])",
        "line 5 exits with 2",
    ),
    "an exception": ("def get_config(): return 1 / 0", "line 4 raises ZeroDivisionError: div"),
    "an exception that is no Exception": (
        "class Stop(BaseException): pass\nraise Stop('now')",
        "line 5 raises Stop: now.",
    ),
    "an exception of several lines": ("raise ValueError('a\\nb.')", "raises ValueError: a b."),
    "an exception without a text": ("assert 0", "line 4 raises AssertionError."),
    "a loop": ("def f(): f()\nf()", "line 4 raises RecursionError"),
    "no such module": ("import no_such_module", "line 4 raises ModuleNotFoundError"),
    "no Python": ("def get_config(:", "line 4 raises SyntaxError"),
    "a wrong type": (SETS.format("train.steps = 'ten'"), "line 6 raises TypeError: .*'steps'"),
    "a fraction": (SETS.format("train.steps = 1.5"), "line 6 raises TypeError: .*'steps'"),
    "a value for a group": (SETS.format("train = 3"), "line 6 raises TypeError: .*'train'"),
    "an unknown key": (SETS.format("train.stepz = 3"), "did you mean 'train.steps'"),
    "an unknown group": (SETS.format("trian.steps = 3"), 'line 6 raises .*"train"'),
    "a key of another group": (
        RETURNS + "ConfigDict({'learning_rate': 1.0})",
        r"config\.learning_rate is not .*'optimizer\.learning_rate'",
    ),
    "a text for a number": (
        RETURNS + "ConfigDict({'train': {'steps': 'ten'}})",
        r"config\.train\.steps is 'ten' \(str\): give a value of type int",
    ),
    "a list for a text": (RETURNS + "ConfigDict({'data': {'files': ['a']}})", "of type str"),
    "a value in the place of a group": (
        RETURNS + "ConfigDict({'train': 3})",
        r"config\.train is 3: it is a group of keys",
    ),
    "a value that is asked for": (
        RETURNS + "ConfigDict({'train': {'steps': config_dict.required_placeholder(int)}})",
        r"config\.train\.steps is None",
    ),
    "keys that are numbers": (RETURNS + "ConfigDict({1: 2, 'seed': 3})", "use strings as keys"),
    "a config inside itself": (
        "def get_config():\n    c = ConfigDict({'seed': 1})\n    c.model = c\n    return c",
        "not a tree",
    ),
    "a function as an option": (
        SETS.format("optimizer.options = {'mask': len}"),
        r"config\.optimizer\.options\.mask is .*give a string, a number",
    ),
    "a set as an option": (
        SETS.format("model.moe.options = {'gshard': {'jitter': {1}}}"),
        r"config\.model\.moe\.options\.gshard\.jitter is \{1\} \(set\)",
    ),
    "options of no component": (
        SETS.format("model.moe.options = {'gshrad': {'jitter': 0.1}}"),
        "'gshrad' is unknown .did you mean 'gshard'",
    ),
    "options that are a number": (
        SETS.format("model.moe.options = {'gshard': 3}"),
        r"model\.moe\.options\.gshard is 3: it must be a table of knobs",
    ),
    "a weight that is a bool": (
        SETS.format("data.mixture = {'a': {'files': 'x', 'weight': True}}"),
        r"data\.mixture\.a\.weight is True",
    ),
    "no function": ("x = 1", r"defines no get_config\(\)"),
    "no call": ("get_config = 3", r"defines no get_config\(\)"),
    "nothing": (RETURNS + "None", "returns NoneType, not a ConfigDict"),
    "a plain dict": (RETURNS + "{}", "returns dict, not a ConfigDict"),
    "a generator": ("def get_config(): yield 1", "returns generator, not a ConfigDict"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_the_file(tmp_path, name):
    text, sentence = FILES[name]
    (tmp_path / "c.py").write_text(f"{HEAD}{text}\n")
    with pytest.raises(UserError, match=sentence) as error:
        load_config(str(tmp_path / "c.py"))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("signature", "body", "argument", "sentence"),
    [
        ("", "pass", ":a", "takes no argument: leave out ':a'"),
        ("arg=''", "pass", ":a", "ignores its argument: leave out ':a'"),
        ("arg=''", "del arg", ":a", "ignores its argument"),
        ("arg=''", "arg = 3", ":a", "ignores its argument"),
        ("*args", "pass", ":a", "ignores its argument"),
        ("arg", "print(arg)", "", r"needs an argument \(missing .*'arg'\): write .*c\.py:ARG"),
        ("arg, more", "print(arg)", ":a", "cannot take one argument"),
        ("arg=''", "print(arg)", ":a", None),
        ("arg=''", "print(f'{arg}')", ":a", None),
        ("arg=''", "print([arg for _ in 'ab'])", ":a", None),
        ("arg=''", "print(lambda: arg)", ":a", None),
        ("arg=''", "print(locals())", ":a", None),
        ("*args", "print(args)", ":a", None),
        ("arg=''", "del arg", "", None),
        ("", "pass", ":", None),
    ],
)
def test_the_argument_of_a_file(tmp_path, signature, body, argument, sentence):
    """An argument that the file ignores is refused, or the user would get the default variant."""
    text = f"{HEAD}def get_config({signature}):\n    {body}\n    return default_config()\n"
    (tmp_path / "c.py").write_text(text)
    path = f"{tmp_path / 'c.py'}{argument}"
    if sentence is None:
        load_config(path)
        return
    with pytest.raises(UserError, match=sentence):
        load_config(path)


def test_a_decorated_function_is_given_its_argument(tmp_path):
    """A wrapper may use the argument in any way, so it is never refused."""
    text = """import functools
def with_steps(function):
    @functools.wraps(function)
    def wrapped(arg):
        config = function(arg)
        config.train.steps = int(arg)
        return config
    return wrapped
@with_steps
def get_config(arg): return default_config()
"""
    (tmp_path / "c.py").write_text(HEAD + text)
    assert load_config(f"{tmp_path / 'c.py'}:7").train.steps == 7


def test_a_path_that_is_no_python_file(tmp_path):
    (tmp_path / "c.txt").write_text("x = 1")
    for path, sentence in (("no.py", "no file"), ("", "is a folder"), ("c.txt", r"end in \.py")):
        with pytest.raises(UserError, match=sentence):
            load_config(str(tmp_path / path))


def test_a_frozen_config_takes_overrides(tmp_path):
    (tmp_path / "c.py").write_text(f"{HEAD}{RETURNS}FrozenConfigDict(default_config())\n")
    assert load_config(str(tmp_path / "c.py"), {"train.steps": 7}).train.steps == 7


def test_a_required_value_is_given_as_an_override(tmp_path):
    body = "ConfigDict({'train': {'steps': config_dict.required_placeholder(int)}})"
    (tmp_path / "c.py").write_text(f"{HEAD}{RETURNS}{body}\n")
    assert load_config(str(tmp_path / "c.py"), {"train.steps": 7}).train.steps == 7


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("learning_rate", 1.0, r"did you mean 'optimizer\.learning_rate'"),
        ("model", 3, r"config\.model is a group of keys"),
        ("model.moe", {}, r"config\.model\.moe is a group of keys"),
        ("train.steps.more", 3, r"config\.train\.steps is a value and has no key 'more'"),
        ("train.steps", "ten", r"config\.train\.steps cannot be 'ten'"),
        ("data.mixture", 3, r"config\.data\.mixture cannot be 3"),
    ],
)
def test_a_mistake_in_the_overrides(tmp_path, key, value, sentence):
    (tmp_path / "c.py").write_text(f"{HEAD}{RETURNS}default_config()\n")
    with pytest.raises(UserError, match=sentence):
        load_config(str(tmp_path / "c.py"), {key: value})


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text(f"{HEAD}{RETURNS}ConfigDict({{'seed': 7}})\n")
    assert load_config("~/c.py").seed == 7
