"""The reading room: queues whose answer is known, what no order can change, and the published finding that a triage
without a limit lets the missed films sink."""
import math
import time

import numpy as np
import pytest
from conftest import pace

from radiology_ai.core import DataError, rng
from radiology_ai.metrics.intervals import student_quantile
from radiology_ai.report.reading_room import (
    ReadingRoom,
    erlang_wait,
    operating_tiers,
    reading_section,
    reading_starts,
    simulate_reading,
    waiting_figures,
)


@pytest.mark.parametrize('readers,load', [(1, .6), (2, .8), (4, .85)])
def test_the_wait_is_that_of_erlang(readers, load):
    a_day = 24*60*load*readers/9
    room = ReadingRoom(a_day, (1,)*24, (readers,)*24, 9, None, days=40)
    waits = []
    for seed in range(12):
        at, minutes, _ = room.draw(seed)
        waits.append((reading_starts(at, minutes, np.zeros(len(at)), room.readers) - at).mean())
    half = student_quantile(.999, 11)*np.std(waits, ddof=1)/math.sqrt(12)
    assert abs(np.mean(waits)-erlang_wait(a_day/24, 9, readers))<half


def test_erlang_for_one_reader_is_the_plain_formula():
    for load in (.1, .5, .9): assert erlang_wait(60*load/10, 10, 1)==pytest.approx(10*load/(1-load))
    with pytest.raises(DataError, match='readers are needed'): erlang_wait(10, 10, 1)


def slow_starts(at, minutes, tier, readers, limit):
    "The same by looking through the whole list each time a reader is free."
    start, busy, now = np.full(len(at), np.nan), [], 0.
    while np.isnan(start).any():
        busy = [b for b in busy if b>now]
        there = [i for i in range(len(at)) if np.isnan(start[i]) and at[i]<=now]
        if there and len(busy)<readers[int(now//60)%24]:
            late = [i for i in there if at[i]<=now-limit]
            i = late[0] if late else min(there, key=lambda i: (tier[i], i))
            start[i] = now
            busy.append(now+minutes[i])
        else: now = min([60*(now//60+1), *busy, *(a for a in at if a>now)])
    return start


@pytest.mark.parametrize('seed', range(30))
def test_equals_a_search_through_the_list(seed):
    gen = rng(seed, 'small room')
    n, readers = int(gen.integers(1, 60)), gen.integers(0, 4, 24)
    readers[int(gen.integers(24))] += 1
    at, minutes = np.sort(gen.random(n)*gen.choice([60, 600, 3000])), gen.exponential(15, n)
    tier, limit = gen.integers(0, 4, n), float(gen.choice([math.inf, 20, 200]))
    found = reading_starts(at, minutes, tier, readers.tolist(), limit)
    assert np.array_equal(found, slow_starts(at, minutes, tier, readers.tolist(), limit))


def test_what_no_order_can_change():
    """One reader: the work that waits is the same in each order, so that minutes times waiting is (Kleinrock
    1965)."""
    gen = rng(0, 'conservation')
    at = np.sort(gen.random(3000)*30000)
    minutes = gen.exponential(9, 3000)
    orders = [np.zeros(3000), gen.integers(0, 5, 3000), np.argsort(np.argsort(minutes))]
    done = [reading_starts(at, minutes, t, limit=limit) for t in orders for limit in (math.inf, 60)]
    for start in done:
        assert (start>=at).all() and minutes@(start-at)==pytest.approx(minutes@(done[0]-at), rel=1e-9)
        order = np.argsort(start)
        assert (start[order][1:]>=(start+minutes)[order][:-1]-1e-9).all() # one film at a time
        assert (start+minutes).max()==pytest.approx((done[0]+minutes).max())
        idle = (start[order]-np.r_[0, (start+minutes)[order][:-1]]).sum()
        first = np.argsort(done[0])
        assert idle==pytest.approx((done[0][first]-np.r_[0, (done[0]+minutes)[first][:-1]]).sum())


def test_within_a_tier_the_first_is_the_first():
    gen = rng(1, 'tiers')
    at, minutes, tier = np.sort(gen.random(2000)*20000), gen.exponential(15, 2000), gen.integers(0, 3, 2000)
    start = reading_starts(at, minutes, tier, (2,)*24)
    for k in range(3): assert (np.diff(start[tier==k])>=0).all()
    alike = reading_starts(at, minutes, np.zeros(2000), (2,)*24)
    assert np.array_equal(alike, reading_starts(at, minutes, tier, (2,)*24, limit=0.)) # all are overdue


def three_tiers():
    "Truth and tiers of a model that calls one in ten urgent films normal."
    gen = rng(0, 'three tiers')
    truth = gen.choice(3, 4000, p=[.1, .4, .5])
    said = np.array([[.8, .1, .1], [.08, .77, .15], [.03, .17, .8]]).cumsum(1)
    return truth==0, (gen.random(4000)[:, None]>said[truth]).sum(1)


def test_the_published_finding():
    "Baltruschat 2021: the mean falls by half, the maximum rises as the missed films sink, a limit holds it."
    urgent, tier = three_tiers()
    fifo, model, limited = simulate_reading(urgent, {'model': tier}, repeats=30)
    assert model['mean']['high']<.5*fifo['mean']['value'] and model['mean change']['high']<0
    assert model['95th percentile change']['high']<0
    assert model['maximum change']['low']>0
    assert limited['mean change']['high']<0
    assert limited['maximum']['value']<model['maximum']['value'] and limited['maximum change']['value']<20


def test_without_missed_films_nothing_sinks():
    urgent, _ = three_tiers()
    _, model, limited = simulate_reading(urgent, {'perfect': np.where(urgent, 0, 1)}, repeats=10)
    assert model['maximum change']['high']<0 and model['mean change']['high']<0
    assert limited['maximum change']['high']<=0
    _, useless, _ = simulate_reading(urgent, {'none': np.ones(len(urgent), int)}, repeats=5)
    assert useless['mean change']['value']==useless['maximum change']['value']==0


def test_prevalence_and_repetition():
    urgent, tier = three_tiers()
    rare = simulate_reading(urgent, {'m': tier}, prevalence=.02, repeats=5)
    assert rare==simulate_reading(urgent, {'m': tier}, prevalence=.02, repeats=5)
    assert rare!=simulate_reading(urgent, {'m': tier}, prevalence=.02, repeats=5, seed=1)
    assert rare[1]['mean']['value']<simulate_reading(urgent, {'m': tier}, prevalence=.5,
        repeats=5)[1]['mean']['value']
    assert np.isnan(waiting_figures([])).all()


def test_refusals():
    for wrong, said in ((dict(films=600), 'grow for ever'), (dict(readers=(0,)*24), 'Give 24 numbers'),
            (dict(minutes=0), 'minutes is 0'), (dict(arrivals=(1,)*23), 'Give 24 numbers')):
        with pytest.raises(DataError, match=said): ReadingRoom(**wrong)
    with pytest.raises(DataError, match='do not ascend'): reading_starts([2, 1], [1, 1], [0, 0])
    with pytest.raises(DataError, match='at least one'): reading_starts([1], [1], [0], (0,)*24)
    with pytest.raises(DataError, match='one of each'): reading_starts([1, 2], [1, 1], [0])
    with pytest.raises(DataError, match='needs both kinds'): simulate_reading([True, True], {'x': [0, 0]})
    with pytest.raises(DataError, match='The tiers of'): simulate_reading([True, False], {'x': [0]})
    with pytest.raises(DataError, match='needs both kinds'): operating_tiers([0, 0], [.1, .2])
    assert len(reading_starts([], [], []))==0


def test_a_hundred_thousand_films_in_five_seconds():
    room = ReadingRoom(days=455)
    at, minutes, gen = room.draw(0)
    begun = time.process_time()
    reading_starts(at, minutes, gen.integers(0, 3, len(at)), room.readers, 240)
    assert len(at)>99_000 and time.process_time()-begun<5*pace()


def test_section_of_unknown_truths_and_tiers():
    urgent, tier = three_tiers()
    truth = np.where(np.arange(4000)%7==0, np.nan, urgent)
    score = urgent + rng(0, 'score').normal(0, .6, 4000)
    section = reading_section(truth, score, .5, room=ReadingRoom(days=2))
    rows = section.parts[-1].rows
    assert [k for k, _ in section.by_kind()]==['text', 'chart', 'chart', 'table'] and len(rows)==3
    assert rows[1]['mean: change']['high']<0
    tiers = reading_section(truth, score, tier=tier, room=ReadingRoom(days=2), positive='urgent tier')
    share = (tier[(truth==1)]==0).mean()
    assert f'{100*share:.0f} % of them' in tiers.parts[-1].caption
