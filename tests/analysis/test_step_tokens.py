"""Which tokens tell the steps of one record from those of the others."""

from analysis.step_tokens import differing_ids, step_labels, step_of, telling_ids


def test_signs_and_what_most_records_hold_tell_nothing():
    # Id 9 is a sign, id 1 a word of three records in four, ids 5 to 8 words of one.
    steps = [[[1, 5, 9]], [[1, 6, 9]], [[9, 7]], [[1, 8]]]
    found = telling_ids(steps, is_word=lambda i: i != 9)
    assert found == [[[5]], [[6]], [[7]], [[8]]]


def test_each_step_is_compared_with_the_same_step_of_others():
    steps = [[[1], [5]], [[1, 5]], [[1, 6]]]
    found = telling_ids(steps, is_word=lambda i: True)
    # All records hold 1 first; the first record alone has a second step.
    assert found == [[[1], [5]], [[5]], [[6]]]


def test_labels_are_the_last_telling_ids():
    assert step_labels([[[3, 4], [5]], [[6]], [], [[]]]).tolist() == [
        [4, 5], [6, -1], [-1, -1], [-1, -1],
    ]  # fmt: skip


def test_thoughts_are_decoded_to_words_in_which_answers_differ():
    assert differing_ids([[9, 4, 1], [9, 5, 1], [9, 4, 1]]) == [4, 5]
    assert differing_ids([[9, 4], [4, 9]]) == [4, 9]


def test_several_thoughts_stand_for_one_step():
    assert [step_of(k, c_thought=2) for k in range(1, 6)] == [0, 0, 1, 1, 2]
