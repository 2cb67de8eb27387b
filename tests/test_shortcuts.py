"""The audit of shortcuts: its linear reader against scikit-learn, its figure within strata against all pairs, quiet where there
is nothing, and what is known of real chests."""
import json
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import DataError, rng
from radiology_ai.metrics.ranking import auroc, auroc_ci
from radiology_ai.report.card import ReportData
from radiology_ai.report.page import standard_sections, write_report
from radiology_ai.report.shortcuts import (
    PENALTIES,
    audit_shortcuts,
    linear_scores,
    metadata_columns,
    metadata_features,
    patient_parts,
    pixel_features,
    score_strata,
    shortcut_section,
    stratified_auroc_ci,
    thumbnails,
)


def predictions(seed=0, n=300, skill=2.5, labels=('target',)):
    "Predictions of labels that nothing beside them tells, two images a patient."
    gen = rng(seed, 'no shortcut')
    t = (gen.random((n, len(labels)))<.35).astype(float)
    s = 1/(1+np.exp(-gen.normal(0, 1, t.shape) - skill*t + 1))
    scores = ['score'] if labels==('target',) else [f'p_{l}' for l in labels]
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)],
        'patient_id': [f'p{k//2}' for k in range(n)],
        'view': gen.choice(['AP', 'PA'], n), 'sex': gen.choice(['F', 'M'], n), 'age': gen.integers(18, 90, n),
        **dict(zip(labels, t.T)), **dict(zip(scores, s.T))})


def noise(table, seed=0):
    gen = rng(seed, 'films')
    return {i: gen.integers(60, 200, (32, 32)).astype(np.uint8) for i in table.image_id}


@pytest.mark.slow
def test_quiet_where_there_is_nothing():
    "Found in at most about one of 40 figures, as is said; red never, as the model is good."
    found, red = [], []
    for seed in range(50):
        table = predictions(seed)
        films = noise(table, seed) if seed<5 else None # the pixels of five
        o = audit_shortcuts(table, films, seed=seed)['labels'][0]
        found += [b['found'] for b in o['baselines'].values()]
        red.append(o['red'])
    assert len(found)==60 and sum(found)<=5 and sum(red)==0 # 1.5 expected; 6 or more once in 250


def test_each_kind_of_shortcut_is_found_and_red():
    table = predictions(1, skill=1)
    ill = table.target==1
    gen = rng(1, 'shortcut')
    header = table.assign(view=np.where(ill, 'AP', gen.choice(['AP', 'PA'], len(table), p=[.1, .9])))
    bright, marked = noise(table), noise(table)
    for i in table.image_id[ill]:
        bright[i] = (bright[i]//2+90).astype(np.uint8)
        marked[i][:3, :4] //= 2
    for name, data, films in (('metadata', header, noise(table)), ('thumbnail', table, bright),
            ('border', table, marked)):
        o = audit_shortcuts(data, films)['labels'][0]
        assert o['strongest']==name or (name, o['strongest'])==('thumbnail', 'border'), name
        assert o['baselines'][name]['found'] and o['baselines'][name]['red'] and o['red'], name
        assert o['baselines'][name]['difference']['low']<=0
    assert audit_shortcuts(header)['labels'][0]['column']=='view'
    assert audit_shortcuts(table.assign(score=.5))['labels'][0]['model']['reason']
    assert not audit_shortcuts(table.assign(score=.5))['labels'][0]['red']


def test_the_linear_reader_is_a_ridge_regression():
    Ridge = pytest.importorskip('sklearn.linear_model').Ridge
    gen = rng(2, 'ridge')
    x, t = gen.normal(size=(400, 7))*[1, 10, .1, 5, 1, 1, 1] + 3, np.zeros((400, 2))
    t[:, 0], t[:, 1] = x[:, 0]+gen.normal(size=400)>3.5, gen.random(400)<.3
    t[gen.random(400)<.2, 1] = np.nan
    part = patient_parts(np.arange(400)//2)
    assert all(len(set(part[k:k+2]))==1 for k in range(0, 400, 2)) and np.bincount(part).min()==80
    found = linear_scores(x, t, part)
    for c in range(2):
        for i in range(5):
            use = (part!=i) & ~np.isnan(t[:, c])
            mean, sd = x[use].mean(0), x[use].std(0)
            fits = [Ridge(alpha=p*use.sum()).fit((x[use]-mean)/sd, t[use, c]) for p in PENALTIES]
            own = [((x-mean)/sd@f.coef_)[part==i]/((x[use]-mean)/sd@f.coef_).std() for f in fits]
            assert min(np.abs(o-found[part==i, c]).max() for o in own)<2e-3


def test_patients_are_not_recognised():
    "Columns that name a patient tell nothing, as the other images of the same one are never taught."
    gen = rng(3, 'names')
    patient = np.arange(600)//3
    x, t = np.repeat(gen.normal(size=(200, 30)), 3, 0), np.repeat(gen.random(200)<.4, 3).astype(float)
    s = linear_scores(x, t[:, None], patient_parts(patient))[:, 0]
    assert abs(auroc(t, s)-.5)<.11


def test_teachers_teach_and_are_not_judged():
    table = predictions(4, 600)
    table = table.assign(age=40 + 12*table.target + rng(4, 'age').normal(0, 9, 600))
    test, more = table[:60], table[40:]
    alone, taught = (audit_shortcuts(test, columns=['age'], teach=t) for t in (None, more))
    assert (alone['teachers'], taught['teachers'])==(0, 540) # patients of the test are left out
    assert taught['labels'][0]['images']==60
    assert taught['labels'][0]['baselines']['metadata']['auroc']['value']>.7
    assert audit_shortcuts(test, columns=['age'], teach=more.drop(columns='target'))['teachers']==0


def all_pairs(t, s, strata):
    won = [(s[i]>s[j]) + .5*(s[i]==s[j]) for i in range(len(t)) for j in range(len(t))
        if t[i]==1 and t[j]==0 and strata[i]==strata[j]]
    return np.mean(won)


def test_within_strata_is_the_share_of_pairs():
    gen = rng(5, 'pairs')
    for _ in range(10):
        t, s, strata = (gen.random(60)<.4).astype(float), gen.integers(0, 8, 60), gen.integers(0, 4, 60)
        t[gen.random(60)<.1] = np.nan
        assert stratified_auroc_ci(t, s, strata)[0]==pytest.approx(all_pairs(t, s, strata))
    t, s = (gen.random(500)<.3).astype(float), gen.normal(size=500)
    one = stratified_auroc_ci(t, s, np.zeros(500), np.arange(500)//2)
    plain = auroc_ci(t, s, np.arange(500)//2)
    assert np.allclose(one, plain, atol=.004)
    with pytest.raises(DataError, match='No stratum'): stratified_auroc_ci(t, s, np.arange(500))
    with pytest.raises(DataError, match='strata'): stratified_auroc_ci(t, s, np.zeros(3))


def test_the_interval_within_strata_covers():
    """Clustered patients, strata that go with the label: the true value lies inside in about 95 of 100
    samples."""
    inside, true = [], 0.6914625 # of two normals half a standard deviation times the root of two apart
    for seed in range(200):
        gen = rng(seed, 'coverage')
        view = np.repeat(gen.random(120)<.5, 2)
        t = (gen.random(240)<np.where(view, .6, .2)).astype(float)
        s = gen.normal(size=240) + t/np.sqrt(2) + 3*view
        ci = stratified_auroc_ci(t, s, view, np.arange(240)//2)
        inside.append(ci.low<=true<=ci.high)
    assert .91<=np.mean(inside)<=.985


def test_confounded_model_is_nothing_within():
    "A reader of the view is red; within the view its interval holds 0.5 about 95 times in 100."
    outside = 0
    for seed in range(12):
        table = predictions(seed, 600)
        view = np.where(rng(seed, 'view').random(600)<.15+.7*table.target, 'AP', 'PA')
        bad = table.assign(view=view, score=(view=='AP')*.4 + .3 + rng(seed, 'jitter').normal(0, .05, 600))
        o = audit_shortcuts(bad, columns=['view'])['labels'][0]
        assert o['model']['low']>.7 and o['red']
        outside += not o['within']['low']<=.5<=o['within']['high']
    assert outside<=3
    good = audit_shortcuts(table.assign(view=view), columns=['view'])['labels'][0]
    assert not good['red'] and good['within']['low']>.85


def test_unknown_labels_and_few_patients():
    names = ('effusion', 'mass', 'hernia')
    table = predictions(8, 300, labels=names)
    table.loc[rng(8, 'unknown').random(300)<.4, 'mass'] = np.nan
    table['hernia'] = np.where(np.arange(300)<6, 1., 0.)
    found = audit_shortcuts(table, noise(table))['labels']
    assert [o['images'] for o in found]==[300, table.mass.notna().sum(), 300]
    assert '3 patients' in found[2]['baselines']['border']['auroc']['reason'] and not found[2]['red']
    alone = audit_shortcuts(table.assign(effusion=np.nan, hernia=np.nan), noise(table), ['mass'])['labels'][0]
    assert alone['baselines']['border']['auroc']['n']==found[1]['baselines']['border']['auroc']['n']
    assert audit_shortcuts(table[:4])['labels'][0]['baselines']['metadata']['auroc']['reason']


def test_order_of_rows_does_not_count():
    table = predictions(9)
    a, b = (audit_shortcuts(t)['labels'][0] for t in (table, table.sample(frac=1, random_state=3)))
    for x, y in ((a['within'], b['within']), (a['baselines']['metadata']['auroc'],
            b['baselines']['metadata']['auroc'])):
        assert x['value']==pytest.approx(y['value'], abs=.03)
    same = [json.dumps(audit_shortcuts(table, noise(table)), sort_keys=True) for _ in range(2)]
    assert same[0]==same[1]


def test_columns():
    table = pd.DataFrame({'image_id': [f'i{k}' for k in range(100)], 'PatientAge': ['045Y', '9M']*50,
        'KVP': np.arange(100.),
        'Manufacturer': ['x', None]*50, 'source': [f'{k}.png' for k in range(100)], 'Modality': 'CR',
        'score': .5})
    assert metadata_columns(table)==['PatientAge', 'KVP', 'Manufacturer', 'source']
    assert list(metadata_features(table))==['PatientAge', 'KVP', 'Manufacturer']
    assert metadata_features(table.assign(KVP=np.nan), ['KVP'])=={}
    with pytest.raises(DataError, match='no column'): metadata_features(table, ['scanner'])


def test_pixels():
    film = np.zeros((256, 256), np.uint8)
    film[64:192, 64:192] = 255
    thumb = thumbnails([film, film.astype(float)/255])
    assert np.allclose(thumb[0], thumb[1]) and thumb.max()==1
    seen = pixel_features(thumb)
    assert seen['border'].sum()==0 and seen['thumbnail'].mean()==pytest.approx(.25)
    assert len(np.unique(score_strata(np.random.default_rng(0).normal(size=500))))==10


@pytest.mark.slow
def test_a_page_of_32_labels(tmp_path):
    labels = [f'finding_{k}' for k in range(32)]
    table = predictions(10, 300, labels=tuple(labels)).assign(p_finding_3=rng(0, 'guess').random(300))
    data = ReportData('Chests', table, labels=labels)
    data = replace(data, sections=standard_sections(data, noise(table), urgent='finding_0'))
    page = write_report(tmp_path, data, draws=20)
    text, told = page.read_text(), json.loads(page.with_suffix('.json').read_text())
    rows = told['sections'][0]['parts'][1]['table']['rows']
    assert len(rows)==32 and [s['title'] for s in told['sections']]==['Shortcuts', 'Waiting times']
    assert any('1 of 32 labels' in w and 'finding 3' in w for w in told['warnings'])
    assert 2<=text.count('class="red"')<=4 and text.count('The model over its strongest baseline')>=1
    assert shortcut_section(audit_shortcuts(table[['image_id', 'patient_id', *labels,
        *(f'p_{l}' for l in labels)]],
        labels=labels)).parts==['There are neither metadata nor images to look at.']


def test_classes_and_tiers_have_their_sections():
    "The class of a training image teaches each label; tiers of a table say who is urgent."
    gen, n = rng(11, 'classes'), 200
    truth = gen.choice(['viral', 'bacterial'], n)
    p = 1/(1+np.exp(-2*(truth=='viral') + 1 - gen.normal(size=n)))
    table = predictions(11, n).drop(columns=['target', 'score']).assign(truth=truth, viral=(truth=='viral')*1,
        bacterial=(truth!='viral')*1, p_viral=p, p_bacterial=1-p)
    learnt = table.drop(columns=['viral', 'bacterial', 'p_viral', 'p_bacterial'])[100:]
    data = ReportData('Pneumonia', table[:100], labels=['viral', 'bacterial'])
    found, = standard_sections(data, teach=learnt)
    assert 'from 100 further images' in found.parts[0] and len(found.parts[1].rows)==2
    order = ['normal', 'abnormal', 'urgent']
    tiers = table.assign(tier_true=gen.choice(order, n, p=[.5, .3, .2]), triage=p)
    tiers['tier'] = np.where(gen.random(n)<.8, tiers.tier_true, 'normal')
    data = replace(data, table=tiers, figures={'tiers': {'names': order}})
    waiting = standard_sections(data)[1]
    share = (tiers.tier[tiers.tier_true=='urgent']=='urgent').mean()
    assert f'urgent films (urgent) in minutes, {100*share:.0f} %' in waiting.parts[-1].caption
    with pytest.raises(DataError, match='Name one of viral'): standard_sections(data, urgent='gout')


def test_what_is_known_of_real_chests(real_data):
    """chest_nih: source and view alone 0.767 for no finding and 0.787 for pneumonia, 16 x 16 pixels 0.816,
    and 0.93 for the view."""
    m = pd.read_csv(real_data/'chest_nih'/'manifest.csv')
    films = [cv2.imread(str(real_data/'chest_nih'/p), cv2.IMREAD_REDUCED_GRAYSCALE_8) for p in m.path]
    gen = rng(0, 'nobody')
    m = m.assign(image_id=m.image, patient_id=m.patient_id.astype(str),
        source=m.source.str.extract('github:([^/ ]+)')[0],
        nothing=(m.labels=='No Finding')*1., projection=(m['view']=='AP')*1.)
    names = ['nothing', 'Pneumonia', 'projection']
    m = m.assign(**{f'p_{l}': gen.random(len(m)) for l in names})
    found = audit_shortcuts(m, dict(zip(m.image_id, films)), names, columns=['source', 'view'])['labels']
    def holds(o, name, value):
        return o['baselines'][name]['auroc']['low']<=value<=o['baselines'][name]['auroc']['high']
    assert holds(found[0], 'metadata', .767) and holds(found[1], 'metadata', .787)
    assert holds(found[0], 'thumbnail', .816) and found[2]['baselines']['thumbnail']['auroc']['value']>.92
    assert all(o['red'] for o in found) and found[1]['column']=='source'
