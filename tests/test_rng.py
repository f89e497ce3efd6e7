"""Random streams: one for each purpose and counter, the same wherever they are drawn."""

from itertools import combinations

import pytest

from rl_llm.rng import Purpose, key, keyed, stream


def test_no_two_purposes_share_a_stream() -> None:
    assert len({purpose.value for purpose in Purpose.__members__.values()}) == len(Purpose.__members__)
    keys = [{key(purpose, counter) for counter in (0, 1, 2**40, 2**56 - 1)} for purpose in Purpose]
    assert all(not a & b for a, b in combinations(keys, 2))
    draws = {(purpose, n): stream(0, purpose, n).random() for purpose in Purpose for n in range(4)}
    assert len(set(draws.values())) == len(draws)


def test_a_stream_is_that_of_its_key_and_seed() -> None:
    assert stream(3, Purpose.SHUFFLE, 2).random(5).tolist() == keyed(3, key(Purpose.SHUFFLE, 2)).random(5).tolist()
    assert stream(3, Purpose.SHUFFLE, 2).random() != stream(4, Purpose.SHUFFLE, 2).random()


def test_a_samples_key_is_its_id_and_an_evaluations_is_none_of_a_sample() -> None:
    assert key(Purpose.SAMPLE, 12345) == 12345
    with pytest.raises(ValueError, match="SAMPLE: counter"):
        key(Purpose.SAMPLE, key(Purpose.EVALUATION, 0))
