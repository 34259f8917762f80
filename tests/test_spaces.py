"""Search spaces: Hydra's own words are read as they are meant, and what is suggested is what a person would type."""

from __future__ import annotations

import random

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from kd.config import jobs
from kd.errors import InputError
from kd.spaces import Space, spaces


def space(word):
    (found,) = spaces([word]).values()
    return found


@pytest.mark.parametrize(
    ("word", "distribution", "probes"),
    [
        ("temperature=interval(1,16)", FloatDistribution(1, 16), ["1", "16", "6.73"]),
        ("fit.lr=tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 0.1, log=True), ["0.0001", "0.1", "0.0014"]),
        ("fit.epochs=int(interval(4,12))", IntDistribution(4, 12), ["4", "12", "7"]),
        ("fit.epochs=tag(log,int(interval(1,99)))", IntDistribution(1, 99, log=True), ["1", "99", "6"]),
        ("fit.epochs=range(1,5)", IntDistribution(1, 4), ["1", "4"]),
        ("fit.epochs=range(10,1,-4)", IntDistribution(2, 10, step=4), ["2", "10"]),
        ("alpha=range(0.1,1.0,0.1)", FloatDistribution(0.1, 0.9, step=0.1), ["0.1", "0.9"]),
        ("student.name=choice(a,b,a)", CategoricalDistribution(("a", "b")), ["a", "b"]),
        ("alpha=0.1,0.5", CategoricalDistribution(("0.1", "0.5")), ["0.1", "0.5"]),
        ("loss=choice([ce],[ce,kd])", CategoricalDistribution(("[ce]", "[ce,kd]")), ["[ce]", "[ce,kd]"]),
        ("data=glob(cifar*)", CategoricalDistribution(("cifar10", "cifar100")), ["cifar10", "cifar100"]),
        ("+student.options.x=choice(1,2)", CategoricalDistribution(("1", "2")), ["1", "2"]),
    ],
)
def test_a_word_is_the_space_that_hydra_means(word, distribution, probes):
    found = space(word)
    assert found.key == word.partition("=")[0] and found.distribution() == distribution and found.probes() == probes


def test_spaces_are_found_by_their_position():
    found = spaces(["data=mnist", "alpha=interval(0,1)", "temperature=4", "seed=range(0,3)"])
    assert {at: one.key for at, one in found.items()} == {1: "alpha", 3: "seed"}
    assert spaces(["alpha=interval(0,1.0)"])[0].question() == found[1].question()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"no word is a search space; write one, e\.g\. 'temperature=interval\(1,16\)'"),
        (["temperature=4"], "no word is a search space"),
        (["temperature"], "'temperature' is no override"),
        (["a=tag(lgo,interval(1,2))"], "there is no tag 'lgo', only log; did you mean 'log'?"),
        (["a=interval(2,1)"], r"a=interval\(2,1\): an interval goes from a lower to a higher number"),
        (["a=interval(1,inf)"], "both finite"),
        (["a=tag(log,interval(0,1))"], "a logarithm needs a lower bound above 0"),
        (["a=tag(log,choice(1,2))"], r"tag\(log,…\) is for an interval"),
        (["a=range(0,inf)"], "a range has a finite start, stop and step"),
        (["a=range(0,3,0)"], "its step is not 0"),
        (["a=range(5,1)"], r"a=range\(5,1\) holds no number"),
        (["data=glob(zz*)"], r"data=glob\(zz\*\) matches nothing; there are cifar10"),
        (["run.workers=range(0,3)"], "nothing under run/ changes a result"),
        (["run/logger=choice([csv],[])"], "nothing under run/ changes a result"),
        (["alpha=0.5", "alpha=interval(0,1)"], "alpha is given more than once"),
        (["hydra.mode=choice(a,b)"], "hydra.* is not part of a run"),
    ],
)
def test_what_is_no_space_is_refused(words, said):
    with pytest.raises(InputError, match=said):
        spaces(words)


@pytest.mark.parametrize(
    ("low", "high", "value", "text"),
    [
        (1, 16, 3.14159265, "3.142"),
        (1, 16, 12.3456, "12.35"),
        (1, 16, 15.99999, "16"),
        (0, 1, 0.0123456, "0.01235"),
        (0, 1, 0.0, "0"),
        (0, 1, 1.23456e-7, "1.235e-07"),
        (1e-4, 1e-1, 0.00123456, "0.001235"),
        (-5, 5, -1.23456, "-1.235"),
        (1000, 1001, 1000.34567, "1000.346"),
        (0.123446, 1, 0.123446, "0.123446"),  # the nearest number of four digits lies outside
        (10000, 90000, 12345.6, "12350"),
    ],
)
def test_a_number_has_as_many_digits_as_a_person_would_type(low, high, value, text):
    assert Space("", "", low=low, high=high).written(value) == text


def test_what_is_typed_is_inside_and_makes_the_same_config():
    found, draw = space("temperature=interval(0.123456,7.654321)"), random.Random(0)
    for _ in range(200):
        text = found.written(draw.uniform(found.low, found.high))
        assert found.low <= float(text) <= found.high and len(text) <= 6
    assert jobs([f"temperature={text}"])[0][0].config["temperature"] == float(text)
    tenths = space("alpha=range(0.1,1.0,0.1)")
    assert tenths.written(0.1 + 2 * 0.1) == "0.3"
