import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.engine.stopping import StopMatcher


def run(tokens, stops, include_eos):
    matcher, steps = StopMatcher(stops, include_eos), []
    for token in tokens:
        steps.append(matcher.push(token))
        if matcher.stopped:
            break
    return steps, [t for step in steps for t in step] + matcher.flush(), matcher.stopped


def brute_force(tokens, stops, include_eos):
    """Cut at the first position where some stop sequence is complete."""
    for end in range(1, len(tokens) + 1):
        for stop in stops:
            if tokens[:end][-len(stop) :] == stop:
                return tokens[: end if include_eos else end - len(stop)], True
    return tokens, False


token_lists = st.lists(st.integers(0, 2), max_size=12)


@given(token_lists, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3), st.booleans())
@settings(max_examples=500)
def test_output_equals_brute_force(tokens, stops, include_eos):
    _, output, stopped = run(tokens, stops, include_eos)
    assert (output, stopped) == brute_force(tokens, stops, include_eos)


@given(token_lists, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3))
@settings(max_examples=300)
def test_no_token_is_held_longer_than_a_stop_sequence_may_begin_with_it(tokens, stops):
    steps, _, stopped = run(tokens, stops, False)
    held = tokens[sum(map(len, steps)) : len(steps)]
    if not stopped:
        assert not held or any(stop[: len(held)] == held for stop in stops)


@pytest.mark.parametrize("include_eos", [True, False])
def test_a_sequence_over_several_tokens(include_eos):
    steps, output, stopped = run([5, 1, 2, 1, 2, 3, 9], [[1, 2, 3]], include_eos)
    assert stopped
    assert steps == [[5], [], [], [1, 2], [], [1, 2, 3] if include_eos else []]
    assert output == [5, 1, 2, *([1, 2, 3] if include_eos else [])]
