"""Who takes what from whom under an interchange: draws, layers in pairs, and what is refused."""

from __future__ import annotations

import pytest

from kd.errors import InputError
from kd.interchange import Interchange


def change(**fields: object) -> Interchange:
    return Interchange(**{"student": "student.last", "teacher": "teacher.last", **fields})  # type: ignore[arg-type]


def test_all_samples_stand_in_one_circle() -> None:
    for count in (1, 2, 7, 64):
        sources = change().sources(count)
        seen, place = [], 0
        for _ in range(count):
            seen.append(place)
            place = int(sources[place])
        assert sorted(seen) == list(range(count)) and place == 0


def test_draws_are_functions_of_seed_and_position() -> None:
    def drawn(seed: int, epoch: float) -> tuple[list[int], list[int]]:
        one = change()
        one.draws_from(seed)
        one.at(epoch, 4)
        return one.sources(16).tolist(), one.channels(64).tolist()

    assert drawn(0, 0.25) == drawn(0, 0.25)
    assert len({str(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0.0, 0.25, 1.0)}) == 6
    # For ever: a stored run is told again by these.
    assert drawn(5, 1.5)[0] == [2, 12, 7, 15, 0, 8, 5, 14, 10, 1, 9, 13, 4, 6, 3, 11] and drawn(5, 1.5)[1][0] == 25


def test_channels_are_neighbours_and_begin_at_the_same_share_of_both_widths() -> None:
    for epoch in range(20):
        one = change(fraction=0.25)
        one.at(epoch, 20)
        small, large = one.channels(8), one.channels(64)
        assert len(small) == 2 and len(large) == 16
        assert large.tolist() == [(int(large[0]) + i) % 64 for i in range(16)]
        assert int(large[0]) // 8 == int(small[0])
        assert not one.channels(64, pair=1).equal(large) or epoch not in (0, 1)
    assert change(fraction=1.0).channels(5).sort().values.tolist() == [0, 1, 2, 3, 4]
    assert len(change(fraction=0.01).channels(5)) == 1


def test_layers_are_named_bare_and_in_pairs() -> None:
    one = change()
    one.place({"student": ["student.a:maps", "student.fc:input:pooled"], "teacher": ["teacher2.x", "teacher2.y"]})
    assert one.layers("student") == ["a", "fc:input"] and one.layers("teacher2") == ["x", "y"]
    assert one.sides == ("student", "teacher2")
    with pytest.raises(InputError, match=r"names student\.a of the student and teacher\.x, teacher\.y of"):
        one.place({"student": "student.a", "teacher": ["teacher.x", "teacher.y"]})
    with pytest.raises(InputError, match="takes what a layer gives"):
        one.place({"student": "student.a:maps:through:fc", "teacher": "teacher.x"})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: change(fraction=0), "fraction is 0; it must be above 0"),
        (lambda: change(fraction=1.5), "fraction is 1.5"),
        (lambda: change(student="last"), "an interchange names 'last' as a layer of the student"),
        (lambda: change(teacher="student.last"), "'student.last' as a layer of the teacher"),
    ],
)
def test_what_cannot_be_is_refused(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)
