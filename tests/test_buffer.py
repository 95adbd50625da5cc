"""The replay buffer against a plain list of numbered transitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
OBS, ACT = 2, 1
sizes = {"kept": st.integers(0, 4), "ring": st.integers(1, 6), "adds": st.integers(0, 20)}


def transition(i):
    """Number i's transition; no two columns are equal."""
    return np.array([i, i + 0.5]), np.array([-i / 8]), i / 4, np.array([i + 1, i + 1.5]), bool(i % 3), i / 64, i / 512


def row(i):
    return [float(x) for x in np.hstack(transition(i))]


def rows_of(batch):
    return np.column_stack([column.numpy() for column in batch]).tolist()


def make_buffer(awac, kept, ring, adds):
    """Buffer and model: numbers -kept..-1 are kept offline rows, 0, 1, ... are added; the model lists the ring's."""
    buffer = awac.ReplayBuffer(kept + ring, OBS, ACT, "cpu")
    if kept:
        buffer.load(np.array([row(i) for i in range(-kept, 0)], np.float32))
    for i in range(adds):
        buffer.add(*transition(i))
    return buffer, list(range(adds))[-ring:]


@given(**sizes)
def test_it_stores_the_kept_rows_and_the_last_ones_added(awac, kept, ring, adds):
    buffer, model = make_buffer(awac, kept, ring, adds)
    stored = rows_of(buffer.stored())
    assert stored[:kept] == [row(i) for i in range(-kept, 0)]
    assert sorted(stored[kept:]) == [row(i) for i in model]
    assert buffer.size == len(stored) == kept + min(ring, adds)


@given(**sizes, n=st.integers(0, 8))
def test_latest_is_the_last_rows_added_in_order(awac, kept, ring, adds, n):
    buffer, model = make_buffer(awac, kept, ring, adds)
    assert rows_of(buffer.latest(n)) == [row(i) for i in model[len(model) - min(n, len(model)) :]]


@given(**sizes, more=st.integers(0, 8))
def test_a_restored_buffer_goes_on_as_the_saved_one(awac, kept, ring, adds, more):
    buffer, _ = make_buffer(awac, kept, ring, adds)
    state = buffer.state_dict()
    restored, _ = make_buffer(awac, kept, ring, 0)
    restored.load_state_dict(state)
    for i in range(adds, adds + more):
        buffer.add(*transition(i)), restored.add(*transition(i))
    for view in (lambda b: b.stored(), lambda b: b.latest(3)):
        assert rows_of(view(restored)) == rows_of(view(buffer))
    assert len(state["rows"]) == min(ring, adds)


@given(**sizes)
def test_the_saved_state_is_a_copy(awac, kept, ring, adds):
    buffer, model = make_buffer(awac, kept, ring, adds)
    state = buffer.state_dict()
    buffer.add(*transition(99))
    assert sorted(state["rows"].tolist()) == [row(i) for i in model]


@settings(max_examples=30)
@given(**sizes)
def test_samples_are_stored_rows_and_every_stored_row_is_drawn_equally_often(awac, kept, ring, adds):
    buffer, model = make_buffer(awac, kept, ring, adds)
    numbers = [*range(-kept, 0), *model]
    if not numbers:
        return
    torch.manual_seed(0)
    batch = buffer.sample(300 * len(numbers))
    assert [column.shape[1:] for column in batch] == [(OBS,), (ACT,), (), (OBS,), (), (), ()]
    drawn, counts = np.unique(np.array(rows_of(batch)), axis=0, return_counts=True)
    assert drawn.tolist() == sorted(row(i) for i in numbers)
    assert counts.min() > 200 and counts.max() < 400


@given(**sizes)
def test_p_is_rewritten_in_place_and_nothing_else(awac, kept, ring, adds):
    buffer, model = make_buffer(awac, kept, ring, adds)
    stored = buffer.stored()
    stored.p.copy_(stored.states[:, 0] * 2)
    numbers = [*range(-kept, 0), *model]
    assert sorted(rows_of(buffer.stored())) == [[*row(i)[:-2], 2.0 * i, i / 512] for i in numbers]
    assert rows_of(buffer.latest(1)) == [[*row(i)[:-2], 2.0 * i, i / 512] for i in model[-1:]]


@pytest.mark.parametrize("kept", [0, 2])
def test_the_row_after_an_exactly_full_ring_replaces_its_oldest(awac, kept):
    buffer, _ = make_buffer(awac, kept, ring=3, adds=3)
    assert buffer.pointer == kept
    buffer.add(*transition(3))
    assert rows_of(buffer.stored())[kept:] == [row(3), row(1), row(2)]


def test_select_takes_the_same_rows_of_every_column(awac):
    buffer, _ = make_buffer(awac, 0, 6, 6)
    stored = buffer.stored()
    assert rows_of(stored.select(torch.tensor([4, 1]))) == [row(4), row(1)]
    assert rows_of(stored.select(stored.p > 3 / 64)) == [row(4), row(5)]


def test_a_batch_handed_out_does_not_change_when_the_buffer_does(awac):
    buffer, _ = make_buffer(awac, 0, 3, 3)
    sample, latest = buffer.sample(5), buffer.latest(3)
    before = rows_of(sample), rows_of(latest)
    for i in range(10, 13):
        buffer.add(*transition(i))
    assert (rows_of(sample), rows_of(latest)) == before
