"""In what two runs differ."""

from flowalign.settings import differences, flatten


def test_settings_are_flat_and_plain():
    assert flatten({"a": {"b": 1, "c": [2, 3]}, "d": None}) == {"a.b": 1, "a.c": "[2, 3]", "d": "None"}


def test_what_a_continued_run_has_of_its_own_is_no_difference():
    then = {"seed": 0, "ckpt_path": None, "trainer": {"max_epochs": 1, "precision": "32-true"}, "paths": {"x": "a"}}
    now = {"seed": 0, "ckpt_path": "last", "trainer": {"max_epochs": 9, "precision": "32-true"}, "paths": {"x": "b"}}
    assert differences(then, now) == []
    assert differences({**then, "train": True}, {**now, "train": False}) == []  # only evaluated
    assert differences(then, {**now, "trainer": {"max_epochs": 1, "precision": "64-true"}}) != []
    assert differences(then, now | {"seed": 5}) == ["seed=5 instead of 0"]
    assert differences(then, {**now, "algo": {"beta": 1.0}}) == ["algo.beta=1.0 instead of absent"]
