"""Splits hold for any table: no patient crosses, labels are spread, lists and files mean what they say, leaks
are named."""
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radiology_ai.core import DataError
from radiology_ai.data.duplicates import find_copies, same_images, thumbnails
from radiology_ai.data.split import (
    assert_no_leakage,
    fewer_negatives,
    held_out_split,
    load_split,
    official_split,
    patient_folds,
    patient_groups,
    patient_split,
    prevalence,
    save_split,
    split_deviation,
    split_hash,
)

quick = settings(max_examples=25, deadline=None, database=None)


@st.composite
def manifests(draw, least=6, centres=False):
    "A table with three to sixty patients, labels with NaN, rows in any order."
    seed = draw(st.integers(0, 2**32-1))
    gen = np.random.default_rng(seed)
    patients = draw(st.integers(least, 60))
    keys = np.repeat([f'P{i}' for i in range(patients)],
        gen.integers(1, draw(st.sampled_from([2, 4, 15])), patients))
    df = pd.DataFrame({'image_id': [f'i{k}' for k in range(len(keys))], 'patient_id': keys})
    for k in range(draw(st.integers(0, 4))):
        df[f'label{k}'] = np.where(gen.random(len(df))<draw(st.sampled_from([0, .3])), np.nan,
            gen.random(len(df))<gen.choice([.05, .3, .5]))
        df.loc[gen.integers(len(df)), f'label{k}'] = 1.
    if centres: df['site'] = df.patient_id.str[1:].astype(int)%3
    return df.sample(frac=1, random_state=seed % 2**31)


def labels_of(df): return [c for c in df if c.startswith('label')]


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


@quick
@given(manifests(), st.integers(0, 5))
def test_no_patient_crosses_and_sizes_are_exact(df, seed):
    s = quiet(patient_split, df, {'train': .5, 'valid': .25, 'test': .25}, labels_of(df), seed)
    assert s.groupby('patient_id').split.nunique().max()==1 and s.split.notna().all()
    patients,n = s.groupby('split').patient_id.nunique(),df.patient_id.nunique()
    assert all(abs(patients[k] - n*share)<1 for k,share in (('train', .5), ('valid', .25), ('test', .25)))
    assert s.drop(columns='split').equals(df)
    assert_no_leakage(s)


@pytest.mark.slow
@quick
@given(manifests(), st.integers(2, 5), st.integers(0, 5))
def test_folds_keep_patients_together(df, k, seed):
    folds = quiet(patient_folds, df, k, labels_of(df), seed)
    assert folds.groupby(df.patient_id).nunique().max()==1 and set(folds)==set(
        range(k)) and folds.index.equals(df.index)


@pytest.mark.slow
@quick
@given(manifests(), st.integers(0, 5))
def test_same_seed_same_split_in_any_order_of_rows(df, seed):
    a = quiet(patient_split, df, label=labels_of(df), seed=seed)
    b = quiet(patient_split, df.iloc[::-1], label=labels_of(df), seed=seed)
    assert a.split.equals(b.split.loc[a.index]) and split_hash(a)==split_hash(b)


@quick
@given(manifests(), st.data())
def test_nan_never_counts(df, data):
    "Rows with an unknown label have no part in its prevalence, whatever else they say."
    s = quiet(patient_split, df.assign(label0=1.*(np.arange(len(df))%2)), label='label0')
    known = prevalence(s, 'label0')
    hidden = s.index[data.draw(st.integers(0, len(s)-1))]
    s.loc[hidden, 'label0'] = np.nan
    rest = prevalence(s.drop(hidden), 'label0')
    for column in rest:
        assert prevalence(s, 'label0')[column].iloc[0]==pytest.approx(rest[column].iloc[0], nan_ok=True)
    assert list(known)[-1]=='all'


@pytest.mark.slow
@quick
@given(manifests(least=20), st.integers(0, 3))
def test_every_split_gets_a_class_that_has_enough_patients(df, seed):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        s = patient_split(df, {'train': .5, 'valid': .3, 'test': .2}, labels_of(df)[:1], seed)
    told = ' '.join(str(w.message) for w in caught)
    for c in labels_of(df)[:1]:
        for v in df[c].dropna().unique():
            have = s[s[c]==v].groupby('split').patient_id.nunique().reindex(['train', 'valid', 'test'],
                fill_value=0)
            if have.sum()>=3 and df[c].nunique()==1: assert have.min()>=1
            assert (f'{c} = {v} ' in told)==(have.min()==0)
            if have.min()==0:
                with pytest.raises(DataError, match=f'{c} = {v} occurs in'):
                    patient_split(df, {'train': .5, 'valid': .3, 'test': .2}, c, seed,
                        min_positives=int(have.sum())+1)


@pytest.mark.slow
@quick
@given(manifests(), st.data())
def test_patients_with_equal_images_stay_together(df, data):
    ids = st.sampled_from(sorted(df.image_id))
    pairs = pd.DataFrame(data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=5)),
        columns=['image_a', 'image_b'])
    groups = patient_groups(df, pairs)
    if groups.nunique()<3: return
    s = quiet(patient_split, df, label=labels_of(df), duplicates=pairs)
    of = s.set_index('image_id').split
    assert (of[pairs.image_a].to_numpy()==of[pairs.image_b].to_numpy()).all() and s.groupby(
        'patient_id').split.nunique().max()==1
    assert_no_leakage(s, duplicates=pairs)
    torn = s.copy()
    torn.loc[torn.image_id==pairs.image_a[0], 'split'] = 'elsewhere'
    if len(df[groups==groups[torn.split=='elsewhere'].iloc[0]])>1:
        with pytest.raises(DataError, match='more than one split'): assert_no_leakage(torn, duplicates=pairs)


@quick
@given(manifests(centres=True), st.integers(0, 2))
def test_held_out_centres_are_the_whole_test(df, site):
    s = quiet(held_out_split, df, 'site', site, label=labels_of(df))
    assert ((s.split=='test')==(s.site==site)).all()
    assert_no_leakage(s)


@pytest.mark.slow
@quick
@given(manifests())
def test_a_file_gives_the_split_back(tmp_path_factory, df):
    s,path = quiet(patient_split, df, label=labels_of(df)),tmp_path_factory.mktemp('split')/'split.csv'
    assert save_split(s, path)==split_hash(s)==split_hash(load_split(path))
    assert load_split(path, df).split.equals(s.split)
    assert load_split(path, df[:3]).split.tolist()==s.split[:3].tolist()


def table(n=40, **columns):
    return pd.DataFrame({'image_id': [f'i{k}' for k in range(n)],
        'patient_id': [f'P{k//2}' for k in range(n)], **columns})


@pytest.mark.parametrize('change', [lambda t: t.replace('P3', 'P4'), lambda t: t + 'x,y,train\n',
    lambda t: t.replace(',train', ',test', 1), lambda t: t.split('\n', 1)[1],
                                    lambda t: '\n'.join(t.splitlines()[:-1]),
                                    lambda t: t.replace('i7,', 'i77,')])
def test_a_changed_file_is_refused(tmp_path, change):
    path = tmp_path/'split.csv'
    save_split(patient_split(table()), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match='was changed|no split'): load_split(path)


def test_what_does_not_fit_is_named(tmp_path):
    df = table(label=[0., 1.]*20)
    for message, call in {
        "no column 'patient_id'": lambda: patient_split(df.drop(columns='patient_id')),
        r'1 of 40 rows have no patient_id \(rows 3\)': lambda: patient_split(df.assign(patient_id=df.patient_id.where(df.index!=3))),
        'i5 in row 6': lambda: patient_split(df.assign(image_id=df.image_id.where(df.index!=6, 'i5'))),
        "no label column 'labl'; did you mean 'label'": lambda: patient_split(df, label='labl'),
        'sum to 1': lambda: patient_split(df, {'train': .9, 'valid': .2}),
        'The sizes are': lambda: patient_split(df, {'train': 1.2, 'valid': -.2}),
        'mixes numbers and text': lambda: patient_split(df.assign(label=['a', 1]*20), label='label'),
        'no known value': lambda: patient_split(df.assign(label=np.nan), label='label'),
        r'label = 1.0 occurs in 1 patients: none of them in valid, test; min_positives is 1':
            lambda: patient_split(df.assign(label=1.*(df.index==0)), label='label', min_positives=1),
        '20 patients for 21 folds|20 patients for 21 splits': lambda: patient_folds(df, 21),
        r'1 patients cross the lists \(P0: in no list and test\)': lambda: official_split(df,
        {'test': ['i0']}, {'train': 1}),
        r'1 of image_id are in two lists \(i0: train and test\)': lambda: official_split(df,
        {'train': ['i0', 'i1'], 'test': ['i0']}),
        "None of the 1 of image_id in the list 'test'": lambda: official_split(df, {'test': ['x.png']}),
        '38 of 40 images are in no list': lambda: official_split(df, {'test': ['i0', 'i1']}),
        'P0: in no list and test': lambda: held_out_split(df.assign(site=['a'] + ['b']*39), 'site', 'a'),
        r'1 rows have no site \(rows 0\)': lambda: held_out_split(df.assign(site=[None] + ['b']*39), 'site',
        'b'),
        'per_positive is -1': lambda: fewer_negatives(patient_split(df), 'label', -1),
    }.items():
        with pytest.raises(DataError, match=message): call()
    save_split(patient_split(df), tmp_path/'s.csv')
    with pytest.raises(DataError, match='rows 40: new'):
        load_split(tmp_path/'s.csv', pd.concat([df, df[:1].assign(image_id='new')], ignore_index=True))
    with pytest.raises(DataError, match='another patient .* 0: i0'):
        load_split(tmp_path/'s.csv', df.assign(patient_id=df.patient_id.where(df.index!=0, 'P9')))


def test_only_training_is_thinned():
    df = patient_split(table(400, label=1.*(np.arange(400)%8==0)), label='label')
    thin = fewer_negatives(df, 'label', 1.)
    for split in ('valid', 'test'): assert thin[thin.split==split].equals(df[df.split==split])
    train = thin[thin.split=='train'].label
    assert (train==0).sum()==(train==1).sum()==(df[df.split=='train'].label==1).sum()


@pytest.mark.slow
@pytest.mark.parametrize('patients', [None, 1000, 300])
def test_chest_labels_are_spread_better_than_by_the_best_of_random_splits(real_data, patients):
    rows = pd.read_csv(real_data/'labels/nih/Data_Entry_2017_v2020.csv.gz').rename(
        columns={'Image Index': 'image_id', 'Patient ID': 'patient_id'})
    rows = rows[rows.patient_id.isin(rows.patient_id.unique()[:patients])]
    found = rows['Finding Labels'].str.get_dummies('|').drop(columns='No Finding')
    df = pd.concat([rows[['image_id', 'patient_id']], found], axis=1)
    gen = np.random.default_rng(0)
    best = np.ones(2)
    split = quiet(patient_split, df, label=list(found))
    units,keys = pd.factorize(df.patient_id)
    y = np.stack([np.bincount(units, found[c]) for c in found] + [np.bincount(units)], 1).astype(np.float32)
    part = pd.factorize(split.drop_duplicates('patient_id').split)[0]
    for _ in range(200):
        which = np.stack([gen.permutation(part) for _ in range(50)])
        sums = np.stack([(which==s).astype(np.float32)@y for s in range(3)], 1)
        gap = np.abs(sums[...,:-1]/sums[...,-1:] - y[:,:-1].sum(0)/y[:,-1].sum())
        best = np.minimum(best, [gap.max((1, 2)).min(), gap.mean((1, 2)).min()])
    assert (split_deviation(split, list(found))<best).all()


def test_official_list_of_chest_labels(real_data):
    rows = pd.read_csv(real_data/'labels/nih/Data_Entry_2017_v2020.csv.gz').rename(
        columns={'Image Index': 'image_id', 'Patient ID': 'patient_id'})
    listed = pd.read_csv(real_data/'labels/nih/train_val_list.txt.gz', header=None)[0]
    test = set(rows.image_id) - set(listed)
    s = official_split(rows, {'test': test}, {'train': .875, 'valid': .125})
    assert (s.split=='test').sum()==len(test) and set(s.image_id[s.split!='test'])==set(listed)
    assert_no_leakage(s)


def test_rsna_leaks_unless_its_source_is_known(real_data):
    labels = real_data/'labels'
    entries = pd.read_csv(labels/'nih/Data_Entry_2017_v2020.csv.gz').rename(
        columns={'Image Index': 'image_id', 'Patient ID': 'patient_id'})
    rsna = pd.read_csv(labels/'rsna/stage_2_train_labels.csv.gz').drop_duplicates('patientId').rename(
        columns={'patientId': 'patient_id'}).assign(image_id=lambda o: o.patient_id)
    pairs = same_images(rsna, entries, pd.read_csv(labels/'rsna/rsna_to_nih_match.csv.gz'))
    assert len(pairs)==26_684
    with pytest.raises(DataError, match='more than one split'):
        assert_no_leakage(patient_split(rsna, label='Target'), duplicates=pairs)
    assert_no_leakage(patient_split(rsna, label='Target', duplicates=pairs), duplicates=pairs)


def test_copies_of_real_chests_are_found(real_data):
    from PIL import Image
    m = pd.read_csv(real_data/'chest_nih/manifest.csv').drop_duplicates('patient_id').head(150)
    images = [np.asarray(Image.open(real_data/'chest_nih'/p)) for p in m.path]
    copies = [np.asarray(Image.fromarray(a[6:-8, 9:-5]).resize((300, 300))) for a in images]
    pairs = find_copies(images, [255-np.uint8(255*(1-c/255)**1.2) for c in copies], show=False)
    assert (pairs.image_a==pairs.image_b).sum()>=149 and (pairs.image_a!=pairs.image_b).sum()==0
    assert not len(find_copies(images, show=False))
    files = [str(real_data/'chest_nih'/p) for p in m.path[:5]]
    assert list(find_copies(files, images[:5], show=False).image_a.sort_values())==sorted(files)
    assert (np.abs(thumbnails(files, show=False).astype(int) - thumbnails(images[:5], show=False))<=1).all()


def test_copies_in_a_store_are_named_by_image_id(tmp_path):
    import cv2

    from radiology_ai.phantom.chest import simulate_chest
    from radiology_ai.phantom.xray import expose
    from radiology_ai.preprocess.recipe import Preprocess
    from radiology_ai.preprocess.scale import preprocess_folder
    (tmp_path/'films').mkdir()
    films = [(expose(simulate_chest(i, size=160),
        np.random.default_rng(i)).radiograph().pixels*255).astype(np.uint8) for i in range(12)]
    for i, a in enumerate([*films, cv2.convertScaleAbs(films[4], alpha=.8, beta=15)]):
        cv2.imwrite(str(tmp_path/f'films/{i:02d}.png'), a)
    for bits in (8, 16):
        store = preprocess_folder(tmp_path/'films', tmp_path/f'store{bits}', Preprocess(size=96, bits=bits),
            show=False)
        name = dict(zip(store.index.path.map(lambda p: p[-6:-4]), store.index.image_id))
        pairs = find_copies(store, show=False)
        assert [{*p} for p in zip(pairs.image_a, pairs.image_b)]==[{name['04'], name['12']}]
        assert not len(find_copies(store, ids=[v for k, v in name.items() if k!='12'], show=False))
        df = patient_split(pd.DataFrame({'image_id': store.index.image_id,
            'patient_id': store.index.image_id}), duplicates=pairs)
        assert_no_leakage(df, duplicates=pairs)
        with pytest.raises(DataError, match='not in the store'):
            find_copies(store, ids=['nobody'], show=False)
