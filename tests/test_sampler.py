"""Samplers keep their promises for any labels: every batch its minimum, every image seen, NaN never counted,
nothing doubled in validation."""
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from radiology_ai.core import DataError
from radiology_ai.data.codes import category_codes, check_classes
from radiology_ai.data.sampler import (
    BalancedBatchSampler,
    OrderedBatchSampler,
    PairedBatchSampler,
    PositiveShareSampler,
    RepeatedBatchSampler,
    ShuffledBatchSampler,
    WeightedBatchSampler,
    inverse_frequency,
)
from radiology_ai.losses.labels import class_weights

quick = settings(max_examples=60, deadline=None, database=None)
worlds = st.integers(1, 4)


@st.composite
def labels(draw):
    "One column of classes or several of 1, 0 and NaN, with every class there."
    gen = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    n,c = draw(st.integers(1, 120)),draw(st.integers(1, 6))
    unknown = draw(st.sampled_from([0, .1, .6]))
    if draw(st.booleans()):
        y = np.where(gen.random(n)<unknown, np.nan, gen.integers(0, c, n)**2//3)
        y[gen.integers(n)] = 0
        return y
    y = (gen.random((n, c))<gen.random(c)**2).astype(float)
    y[gen.random((n, c))<unknown] = np.nan
    y[gen.integers(n, size=c), np.arange(c)] = 1
    return y


def holds(y):
    "(N, C) bool: which image is known to be positive for which class."
    return np.stack([y==v for v in np.unique(y[~np.isnan(y)])], 1) if y.ndim==1 else y==1


@quick
@given(labels(), st.integers(0, 3), st.integers(0, 20), st.integers(0, 3), worlds)
def test_balanced(y, q, room, epoch, world):
    p = holds(y)
    bs = p.shape[1]*max(q, 1) + 1 + room
    parts = [list(BalancedBatchSampler(y, bs, q, rank=r, world=world).set_epoch(epoch)) for r in range(world)]
    assert len({len(o) for o in parts})==1
    batches = [b for o in parts for b in o]
    assert all(len(b)==bs for b in batches) and set(sum(batches, []))==set(range(len(y)))
    assert all((p[b].sum(0)>=q).all() for b in batches)
    if len(y)>=bs and (p.sum(0)>=q).all(): assert all(len(set(b))==bs for b in batches)
    whole = BalancedBatchSampler(y, bs, q, world=world).batches(epoch).tolist()
    assert [b for step in zip(*parts) for b in step]==whole


@quick
@given(labels(), st.integers(0, 9))
def test_unknown_labels_make_no_class(y, epoch):
    "Images without a known label are dealt, and count for nothing."
    p = holds(y)
    s = BalancedBatchSampler(y, p.shape[1]+4, 1)
    assert s.positive.shape==p.shape and (s.positive==p).all()
    unknown = np.isnan(y) if y.ndim==1 else np.isnan(y).all(1)
    w = inverse_frequency(y)
    assert (w[unknown]==0).all() and (w[~unknown]>0).all()
    assert np.allclose(inverse_frequency(y[~unknown])*w[~unknown].sum(), w[~unknown]*(~unknown).sum())


@quick
@given(st.integers(1, 300), st.integers(1, 40), worlds, st.integers(0, 9), st.booleans())
def test_shuffled(n, bs, world, epoch, drop_last):
    assume(n>=world*-(-n//bs//world))
    try:
        parts = [list(ShuffledBatchSampler(n, bs, 1, drop_last, r, world=world).set_epoch(epoch))
            for r in range(world)]
    except DataError as e:
        assert 'Use fewer processes' in str(e) and n<math.ceil(math.ceil(n/bs)/world)*world
        return
    rows = sum((b for o in parts for b in o), [])
    assert len({len(o) for o in parts})==1 and len(set(rows))==len(rows) and all(1<=len(b)<=bs for o in parts
        for b in o)
    if not drop_last: assert sorted(rows)==list(range(n))
    elif n//bs>=world: assert all(len(b)==bs for o in parts for b in o) and n-len(rows)<bs*world
    assert all(len(o)==len(ShuffledBatchSampler(n, bs, 1, drop_last, r, world=world))
        for r,o in enumerate(parts))


@quick
@given(st.integers(1, 300), st.integers(1, 40), worlds)
def test_two_ranks_never_share_a_validation_image(n, bs, world):
    parts = [list(OrderedBatchSampler(n, bs, r, world)) for r in range(world)]
    assert sum((b for o in parts for b in o), [])==list(range(n))
    assert [len(o) for o in parts]==[len(OrderedBatchSampler(n, bs, r, world)) for r in range(world)]
    sizes = [sum(map(len, o)) for o in parts]
    assert max(sizes)-min(sizes)<=1


@quick
@given(st.integers(1, 200), st.integers(1, 30), worlds, st.integers(0, 2**32-1))
def test_weighted(n, bs, world, seed):
    gen = np.random.default_rng(seed)
    w = gen.random(n)**3*(gen.random(n)<.8)
    w[gen.integers(n)] = 1
    s = WeightedBatchSampler(w, bs, seed=seed, world=world)
    expected = w/w.sum()*s.n_batches*bs
    for e in (0, 3, 1000):
        times = np.bincount(s.batches(e).ravel(), minlength=n)
        assert times.sum()==s.n_batches*bs and s.n_batches%world==0
        assert (np.abs(times-expected)<1+1e-6).all() and (times[w==0]==0).all()
    often = expected>.1 # what should come once in ten epochs comes in 27
    assert (sum(np.bincount(s.batches(e).ravel(), minlength=n) for e in range(5, 32))[often]>0).all()


@quick
@given(labels(), st.integers(1, 20), worlds, st.integers(1, 6))
def test_positive_share(y, bs, world, epochs):
    p = holds(y if y.ndim==2 else (y>0).astype(float)[:,None]).any(1)
    unknown = np.isnan(y).reshape(len(y), -1).any(1)
    if y.ndim==1: y = np.where(unknown, np.nan, y>0)
    no = ~p & ~unknown
    assume(p.any() and no.any())
    s = PositiveShareSampler(y, bs, .8, .3, epochs, world=world)
    seen = np.zeros(len(y), int)
    for e in range(epochs+2):
        b = s.batches(e)
        seen += np.bincount(b.ravel(), minlength=len(y))
        held = p[b].sum(1)
        assert b.shape==(s.n_batches, bs) and np.ptp(held)<=1 and abs(held.sum() - s.share(e)*b.size)<=.5+1e-6
        assert (p|no)[b].all()
    assert np.ptp(seen[p])<=1 and np.ptp(seen[no])<=1
    assert s.share(0)==.8 and s.share(epochs+1)==pytest.approx(.3)


@quick
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5), worlds)
def test_repeated(n, bs, m, world):
    s,seen = RepeatedBatchSampler(n, bs, m, world=world),np.zeros(n, int)
    for e in range(m):
        b = s.batches(e)
        times = np.bincount(b.ravel(), minlength=n)
        assert b.shape==(s.n_batches, bs) and s.n_batches%world==0 and (times%m==0).all()
        seen += times
        if world>=m and n*m>=b.size: # the copies of an image are on different ranks
            assert all(sum(i in b[r::world] for r in range(world))==m for i in np.unique(b) if times[i]==m)
    assert seen.min()>=m and np.ptp(seen)<=m


@quick
@given(labels(), st.integers(1, 8), st.sampled_from([.5, 1, 2, 7]), st.booleans(), worlds)
def test_paired(y, bs, mu, balanced, world):
    unknown = np.isnan(y) if y.ndim==1 else np.isnan(y).all(1)
    assume(unknown.any() and not unknown.all() and round(mu*bs)>=1)
    p = holds(y)
    bs = bs + (p.shape[1] if balanced else 0)
    s = PairedBatchSampler(y, bs, mu, int(balanced), world=world)
    seen = np.zeros(len(y), int)
    for e in range(3):
        b = s.batches(e)
        assert b.shape==(s.n_batches, bs+round(mu*bs)) and not unknown[b[:,:bs]].any() and unknown[b[:,
            bs:]].all()
        if balanced: assert all((p[o].sum(0)>=1).all() for o in b[:,:bs])
        seen += np.bincount(b.ravel(), minlength=len(y))
        assert (seen[unknown]>e).all() and np.ptp(seen[unknown])<=1
    if not balanced: assert np.ptp(seen[~unknown])<=1
    whole = PairedBatchSampler(y, bs, mu, int(balanced), world=world, among=True)
    b = np.concatenate([whole.batches(e) for e in range(2)])
    assert not unknown[b[:,:bs]].any() and np.ptp(np.bincount(b[:,bs:].ravel(),
        minlength=len(y)))<=1 and set(b[:,bs:].ravel())==set(range(len(y)))


def every_sampler(world=1, rank=0, seed=0):
    y = np.where(np.arange(90)%9==0, np.nan, np.arange(90)%4==0)
    share = dict(seed=seed, rank=rank, world=world)
    return [BalancedBatchSampler(y, 8, 2, **share), ShuffledBatchSampler(90, 8, **share),
        WeightedBatchSampler(inverse_frequency(y), 8, **share),
            PositiveShareSampler(y, 8, **share), RepeatedBatchSampler(90, 8, **share),
            PairedBatchSampler(y, 4, 2, **share)]


def test_seed_and_epoch_decide():
    for a, b, other in zip(every_sampler(), every_sampler(), every_sampler(seed=1)):
        first = [list(a.set_epoch(e)) for e in range(3)]
        assert [list(b.set_epoch(e)) for e in (2, 0, 1)]==[first[2], first[0], first[1]]
        assert first[0]!=first[1] and list(other)!=first[0] and list(a)==first[2]


@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_the_batches_of_one(world):
    for one, *parts in zip(every_sampler(world), *(every_sampler(world, r) for r in range(world))):
        whole = [list(map(int, b)) for b in one.batches(0)]
        assert len({len(o) for o in parts})==1 and [b for step in zip(*map(list, parts)) for b in step]==whole


def test_memory_stays_over_epochs():
    s = every_sampler()
    def epochs(numbers):
        tracemalloc.reset_peak()
        for e in numbers:
            for o in s:
                for _ in o.set_epoch(e): pass
        return tracemalloc.get_traced_memory()
    tracemalloc.start()
    try:
        epochs(range(2))
        first,last = epochs(range(2, 4)),epochs(range(4, 24))
    finally: tracemalloc.stop()
    assert last[0]<=first[0] + 20_000 and last[1]<=1.2*first[1] + 20_000


def test_what_cannot_work_is_named():
    for message, call in {
        'There are no images': lambda: BalancedBatchSampler([]),
        'No image has the class 1': lambda: BalancedBatchSampler([[1, 0], [1, np.nan]]),
        'cannot hold 3 of each of 2 classes': lambda: BalancedBatchSampler([0, 1], 5, 3),
        'Label 1 holds 2.0 in row 0': lambda: BalancedBatchSampler([[1, 2.], [0, 1]]),
        'bs is 0': lambda: ShuffledBatchSampler(3, 0),
        'rank is 2 of 2': lambda: OrderedBatchSampler(3, 2, 2, 2),
        '-1.0 in row 1': lambda: WeightedBatchSampler([1, -1]),
        'No image has a known label': lambda: inverse_frequency([np.nan, np.nan]),
        'No image is negative': lambda: PositiveShareSampler([1, 1, np.nan]),
        'from 1.2 to 0.3': lambda: PositiveShareSampler([1, 0], start=1.2),
        'm is 0': lambda: RepeatedBatchSampler(5, 2, 0),
        'None of 2 images is labelled': lambda: PairedBatchSampler([np.nan, np.nan]),
        'mu is 0': lambda: PairedBatchSampler([0, np.nan], mu=0),
    }.items():
        with pytest.raises(DataError, match=message): call()


# --- -1 of `category_codes` is unknown

def test_a_class_of_minus_one_is_unknown_as_nan_is():
    y = np.array([0, 1, -1, 2, 0, -1, 1, 0, 2, -1]*4)
    nan = np.where(y<0, np.nan, y)
    def same(make): return all(make(y).batches(e).tolist()==make(nan).batches(e).tolist() for e in range(3))
    assert same(lambda v: BalancedBatchSampler(v, 6, 1)) and BalancedBatchSampler(y, 6).classes==[0, 1, 2]
    assert same(lambda v: PairedBatchSampler(v, 3, 2,
        min_per_class=1)) and same(lambda v: PairedBatchSampler(v, 3, 2))
    binary = np.where(y>1, -1, y)
    assert same(lambda v: PositiveShareSampler(np.where(v==2, v*0-1, v), 6))
    known = np.flatnonzero(binary>=0)
    assert set(PositiveShareSampler(binary, 6).batches(0).ravel())<=set(known)
    assert inverse_frequency(y).tolist()==inverse_frequency(nan).tolist() and (
        inverse_frequency(y)==0).sum()==12
    names = np.array(['a', 'b', 'a', 'c'])
    assert BalancedBatchSampler(names, 3).classes==['a', 'b', 'c']


def test_the_codes_of_a_column_go_everywhere():
    rows = pd.DataFrame(dict(y=['a', None, 'b', None, 'a']))
    codes,vocab = category_codes(rows, 'y')
    assert codes.tolist()==[0, -1, 1, -1, 0] and BalancedBatchSampler(codes, 4).classes==[0, 1]
    assert class_weights(codes, range(2)).tolist()==class_weights(rows.y, vocab).tolist()
    check_classes(codes, vocab, 'y')
    with pytest.raises(DataError, match='All 2 training images have y = a'):
        check_classes(np.array([-1, 0, 0]), vocab, 'y')
