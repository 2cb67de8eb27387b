"""Intervals over seeds hold what they say with three to five of them, and comparisons are corrected for their
number."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

spec = importlib.util.spec_from_file_location('seeds', Path(__file__).parents[1]/'benchmarks'/'seeds.py')
seeds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seeds)


@pytest.mark.parametrize('n', [3, 4, 5])
@pytest.mark.parametrize('share', [0., .5])
def test_they_cover(n, share):
    found = seeds.coverage(n, share=share, sets=2500)
    assert .93<=found['student']<=.97
    if not share: assert found['bootstrap']<.9


def test_it_is_students_interval():
    d = np.array([.031, .052, .018, .044])
    g,test = seeds.over_seeds(d),stats.ttest_1samp(d, 0)
    assert (g.low, g.high)==pytest.approx(tuple(test.confidence_interval())) and g.p==pytest.approx(
        test.pvalue)
    wide = seeds.over_seeds(d, shared=.01**2, units=200)
    assert wide.low<g.low+.02 and wide.value==g.value and wide.p!=g.p
    alone = seeds.over_seeds(d*0+.03, shared=.01**2, units=101) # all of the variance comes from the patients
    assert alone.high-.03==pytest.approx(stats.t.ppf(.975, 100)*.01)
    assert seeds.over_seeds([0., 0, 0]).p==1
    for wrong in ([.1], [.1, np.nan]):
        with pytest.raises(ValueError, match='at least two finite'): seeds.over_seeds(wrong)


def test_shared_patients_and_the_number_of_comparisons():
    gen = np.random.default_rng(0)
    x = np.repeat(gen.normal(size=80), 3) # three images of a patient, alike
    v = seeds.shared_variance(lambda rows: np.full(2, x[rows].mean()), np.repeat(np.arange(80), 3), 2000)
    assert v==pytest.approx(x.var()/80, rel=.15)
    text = seeds.compared({'a': seeds.Gain(.1, .01, .19, .03, 5), 'b': seeds.Gain(.2, .1, .3, .001, 5)})
    assert 'p = 0.03 after Holm over 2' in text['a'] and 'not' not in text['a'] and 'p = 0.002' in text['b']
    text = seeds.compared({'a': seeds.Gain(.1, .01, .19, .03, 5), 'b': seeds.Gain(.1, .0, .2, .04, 5)})
    assert text['a'].endswith('p = 0.06 after Holm over 2: not established')
