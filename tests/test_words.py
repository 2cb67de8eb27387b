"""Words of findings and files as people have them: one finding in its many spellings, 'no finding' beside a finding,
uncertain labels, trees that cannot be one, the columns and paths of re-releases, images that are no persons."""
import warnings
import zipfile

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import DataError
from radiology_ai.data.chest import (
    CHEXPERT,
    NIH14,
    VINBIG,
    VINDR,
    chestxray14,
    chexpert,
    image_sizes,
    padchest,
    rsna_pneumonia,
    siim_pneumothorax,
    vinbig,
)
from radiology_ai.data.datasets import from_csv, from_folders, oai_knees, read_terms, read_tree
from radiology_ai.data.regions import XYXY
from radiology_ai.data.tree import (
    LabelTree,
    chest_terms,
    chest_tree,
    match_words,
    near_word,
    plain_word,
    resolve_uncertain,
    torn_rows,
)

NIH = 'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position'
CHEX = 'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT)
PAD = 'ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,Labels'


def write(path, *lines):
    path.write_text('\n'.join(lines) + '\n')
    return path


def nih(path, *findings):
    return write(path, NIH, *(f'{k}_0.png,{f},0,{k},050Y,M,PA' for k,f in enumerate(findings)))


def chex_line(path, **cells):
    labels = [str(cells.get(c.replace(' ', '_'), '')) for c in CHEXPERT]
    return ','.join([path, 'Male', '60', 'Frontal', 'AP', *labels])


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return call(*args, **kwargs)


def where(dataset): return [(r.line, r.column) for r in dataset.problems.itertuples()]


# Words

@pytest.mark.parametrize('word, known', [
    ('effusion', 'Effusion'), ('PLEURAL EFFUSION', 'Effusion'), ('Pleural-Effusion', 'Effusion'),
    ('pleural thickening', 'Pleural_Thickening'), ('Pleural–Thickening', 'Pleural_Thickening'),
    ('Infiltrate', 'Infiltration'), ('infiltrates', 'Infiltration'), ('Oedema', 'Edema'),
    ('pulmonary  edema', 'Edema'), ('Pulmonary_Fibrosis', 'Fibrosis'), ('hiatal hernia', 'Hernia'),
    ('Nodules', 'Nodule'), ('no_finding', 'No Finding'), ('No findings', 'No Finding'),
    ('NOFINDING', 'No Finding'),
    ('Ｍａｓｓ', 'Mass'), ('Masses', None), ('Pleural', None), ('', None), ('-', None)])
def test_one_finding_in_its_spellings(word, known):
    assert match_words([word], (*NIH14, 'No Finding'))[word]==known


def test_a_word_that_could_be_two_is_none_of_them():
    assert match_words(['effusion', 'Effusion'], ['Effusion', 'EFFUSION'])=={'effusion': None,
        'Effusion': 'Effusion'}
    # both names of a finding in one vocabulary: each is itself
    both = ['Effusion', 'Pleural effusion']
    assert match_words(['EFFUSION', 'pleural_effusion'],
        both)==dict(zip(['EFFUSION', 'pleural_effusion'], both))
    assert plain_word('-')=='-' and plain_word('Выпот')!=plain_word('Узел')
    assert near_word('Efusion', NIH14)=="; did you mean 'Effusion'?" and near_word('xyz', NIH14)==''


def test_nih_words(tmp_path):
    ds = chestxray14(nih(tmp_path/'n.csv', 'MASS|pleural_effusion', 'no finding', 'Pleural Thickening|', ''))
    m = ds.manifest
    assert [[c for c in NIH14 if r[c]==1] for _,r in m.iterrows()]==[['Effusion', 'Mass'], [],
        ['Pleural_Thickening'], []]
    assert m[list(NIH14)].notna().all(axis=1).tolist()==[True, True, True, False]
    boxes = write(tmp_path/'b.csv', 'Image Index,Finding Label,Bbox [x,y,w,h]', '0_0.png,infiltrate,1,1,5,5',
        '0_0.png,MASS,1,1,5,5')
    assert chestxray14(tmp_path/'n.csv', boxes).boxes.label.tolist()==['Infiltration', 'Mass']
    assert chestxray14(tmp_path/'n.csv', tree=chest_tree()).manifest['Pleural effusion'].tolist()[:3]==[1, 0,
        0]
    google = write(tmp_path/'g.csv', 'Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass',
        '0_0.png,yes,No,YES,NO', '1_0.png,perhaps,NO,NO,NO')
    ds = chestxray14(tmp_path/'n.csv', adjudicated=google, errors='list')
    assert ds.manifest.Fracture_adjudicated.fillna(-1).tolist()==[1, -1, -1,
        -1] and where(ds)==[(3, 'Fracture')]


@pytest.mark.parametrize('errors', ['raise', 'list'])
def test_nih_contradictions_and_unknown_words(tmp_path, errors):
    f = nih(tmp_path/'n.csv', 'No Finding|Mass', 'no_finding|Nodules', 'Efusion|Mass', 'Mass')
    if errors=='raise':
        with pytest.raises(DataError, match="3 faults: .*'Efusion' is not known; did you mean 'Effusion'"):
            chestxray14(f)
        return
    ds = chestxray14(f, errors=errors)
    assert sorted(where(ds))==[(2, 'findings'), (3, 'findings'), (4, 'findings')]
    v = ds.manifest[list(NIH14)]
    assert v.loc[:1].isna().all().all() and v.Mass[2]==1 and v.loc[2].isna().sum()==13 and v.loc[3].sum()==1


def test_padchest_words(tmp_path):
    def line(k, terms, projection='PA'):
        return f'{k}.png,0,20150101,s{k},p{k},1950.0,F,{projection},"{terms}"'
    f = write(tmp_path/'p.csv', PAD, line(0, "['Pleural_Effusion', 'EFFUSION']"),
        line(1, "['Normal']", 'ap horizontal'),
        line(2, "['pneumonai']"), line(3, "['normal', 'oedema']", 'l'))
    with pytest.warns(UserWarning) as caught: ds = padchest(f)
    said = ' '.join(str(w.message) for w in caught)
    assert "'pneumonai'; did you mean 'pneumonia'?" in said and 'contradicts itself' not in said.split('pneumonai')[0]
    m = ds.manifest
    assert m['Pleural effusion'][0]==1 and m.Normal.fillna(-1).tolist()==[0, 1, -1, -1]
    assert m['view'].tolist()==['PA', 'AP', 'PA',
        'LAT'] and m.unmapped[2]=='pneumonai' and where(ds)==[(5, 'terms')]
    assert m.loc[2, list(chest_tree().names)].isna().all()
    assert quiet(padchest, write(tmp_path/'q.csv', PAD, line(0, "['mass']", 'APP')),
        errors='list').problems.column.tolist()==[
        'projection']


@pytest.mark.parametrize('errors', ['raise', 'list'])
@pytest.mark.parametrize('finding', ['Edema', 'Fracture', 'Pleural_Other'])
@pytest.mark.parametrize('value', [1.0, -1.0])
def test_chexpert_contradictions(tmp_path, errors, finding, value):
    f = write(tmp_path/'t.csv', CHEX, chex_line('a/train/patient1/study1/view1_frontal.jpg', No_Finding=1.0,
        **{finding: value}), chex_line('a/train/patient2/study1/view1_frontal.jpg', No_Finding=1.0,
        Support_Devices=1.0,
        Edema=0.0))
    if errors=='raise':
        with pytest.raises(DataError, match="line 2 .*'No Finding': is 1 beside a finding"): chexpert(f)
        return
    for unmentioned in ('unknown', 'zeros'):
        ds = chexpert(f, unmentioned=unmentioned, errors=errors)
        assert where(ds)==[(2, 'No Finding')] and ds.manifest.loc[0, list(CHEXPERT)].isna().all()
        assert ds.manifest.loc[1, ['No Finding', 'Support Devices', 'Edema']].tolist()==[1, 1, 0]


def test_vinbig_words_and_contradictions(tmp_path):
    head = 'image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max'
    f = write(tmp_path/'v.csv', head, 'a,PLEURAL EFFUSION,0,R1,1,1,9,9', 'a,Effusion,0,R2,1,1,9,9',
        'b,no_finding,14,R1,,,,', 'b,ILD,5,R1,1,1,9,9', 'c,No finding,14,R3,,,,')
    with pytest.raises(DataError, match='the same reader drew a finding'): quiet(vinbig, f)
    ds = quiet(vinbig, f, errors='list')
    m = ds.manifest.set_index('image_id')
    assert where(ds)==[(4, 'label')] and m.loc['a', 'Pleural effusion']==1 and m.loc['c', 'No finding']==1
    assert m.loc['b', [*VINBIG, 'No finding']].isna().all()


def test_rsna_words(tmp_path):
    labels = write(tmp_path/'l.csv', 'patientId,x,y,width,height,Target', 'a,1,1,9,9,1', 'b,,,,,0', 'c,,,,,0',
        'd,,,,,0')
    classes = write(tmp_path/'c.csv', 'patientId,class', 'a,lung opacity', 'b,NORMAL',
        'c,no lung opacity/not normal',
        'd,Lung_Opacity')
    ds = quiet(rsna_pneumonia, labels, classes, errors='list')
    assert ds.manifest['class'].tolist()==['Lung Opacity', 'Normal', 'No Lung Opacity / Not Normal',
        'Lung Opacity']
    assert where(ds)==[(5, 'class')] # the class of a pneumonia, and no box


def own(path, *cells, head='id,pat,words'):
    return write(path, head, *(f'{k},{k},{c}' for k,c in enumerate(cells)))


def test_own_words(tmp_path):
    names = dict(image_id='id', patient_id='pat')
    f = own(tmp_path/'o.csv', 'Mass|EDEMA', 'mass', 'MASS |edema', 'no_finding', '')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = from_csv(f, names, findings='words')
    assert m.labels==('EDEMA', 'Mass') and m.manifest[['EDEMA', 'Mass']].fillna(-1).values.tolist()==[[1, 1],
        [0, 1],
        [1, 1], [0, 0], [-1, -1]]
    f = own(tmp_path/'w.csv', 'effusion|mass', 'Pleural-Effusion', 'Efusion|Mass', 'NO FINDING')
    ds = from_csv(f, names, findings='words', vocab=['Effusion', 'Mass'], errors='list')
    assert ds.manifest[['Effusion', 'Mass']].fillna(-1).values.tolist()==[[1, 1], [1, 0], [-1, 1], [0, 0]]
    assert where(ds)==[(4, 'words')] and 'did you mean' in ds.problems.problem[0]
    with pytest.raises(DataError, match="'Efusion' is not among Effusion, Mass; did you mean 'Effusion'"):
        from_csv(f, names, findings='words', vocab=['Effusion', 'Mass'])
    with pytest.raises(DataError, match="the word 'view' of column 'words' is the name of a column too"):
        from_csv(own(tmp_path/'c.csv', 'view', 'Mass'), names, findings='words')


def test_a_slip_makes_no_new_label_with_the_old_one_at_0(tmp_path):
    names = dict(image_id='id', patient_id='pat')
    f = own(tmp_path/'o.csv', 'nodule', 'nodule', 'nodules', 'Left mass|stage IIa', 'Right mass|stage IIb',
        'pneumotorax',
        'pneumothorax', 'T10', 'T11')
    with pytest.warns(UserWarning, match='odd cell'): ds = from_csv(f, names, findings='words')
    assert ds.problems.value.tolist()==['nodules', 'pneumothorax'] or ds.problems.value.tolist()==['nodules',
        'pneumotorax']
    assert np.isnan(ds.manifest.nodule[2]) and ds.manifest.nodule[3]==0 and ds.manifest['Right mass'][3]==0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        both = from_csv(f, names, findings='words',
            vocab=['nodule', 'nodules', 'Left mass', 'Right mass', 'stage IIa',
            'stage IIb', 'pneumotorax', 'pneumothorax', 'T10', 'T11']).manifest
    assert both.nodule[2]==0 and both.nodules[2]==1


@pytest.mark.parametrize('errors', ['raise', 'list'])
def test_own_contradictions(tmp_path, errors):
    names = dict(image_id='id', patient_id='pat')
    words = own(tmp_path/'w.csv', 'Mass|No Finding', 'mass')
    cells = own(tmp_path/'c.csv', '1,1,0', '1,0,1', 'no,yes,no',
        head='id,pat,no_finding,Mass,Support Devices')
    kept = dict(labels=['no_finding', 'Mass', 'Support Devices'])
    if errors=='raise':
        with pytest.raises(DataError, match="line 2 .*'Mass|No Finding' contradicts itself"):
            from_csv(words, names, findings='words')
        with pytest.raises(DataError, match="line 2 .*'no_finding': is 1 beside a finding"):
            from_csv(cells, names, **kept)
        return
    ds = from_csv(words, names, findings='words', errors=errors)
    assert where(ds)==[(2, 'words')] and ds.manifest.Mass.isna().tolist()==[True, False]
    ds = from_csv(cells, names, **kept, errors=errors)
    assert where(ds)==[(2, 'no_finding')] and ds.manifest[kept['labels']].fillna(-1).values.tolist()==[[-1,
        -1, -1],
        [1, 0, 1], [0, 1, 0]]
    assert torn_rows(pd.DataFrame({'n': [1, 1, 0, np.nan], 'a': [.7, np.nan, 1, 1]}), 'n',
        ['a']).tolist()==[True,
        False, False, False]


# Names of one's own

@pytest.mark.parametrize('one, two', [('Fx', 'Fx?'), ('HER2+', 'HER2-'), ('Effusion L', 'Effusion-L'),
    ('Перелом', 'Отёк'), ('骨折', '水肿')])
@pytest.mark.parametrize('turned', [False, True])
def test_own_columns_are_literal(tmp_path, one, two, turned):
    names = dict(image_id='id', patient_id='pat')
    if turned: one,two = two,one
    f = write(tmp_path/'o.csv', f'id,pat,{one},{two}', 'a,1,1,0', 'b,2,0,1')
    m = from_csv(f, names, [one, two]).manifest
    assert m[[one, two]].values.tolist()==[[1, 0], [0, 1]]
    assert from_csv(f, names, {'fx': two}).manifest.fx.tolist()==[0, 1]
    g = write(tmp_path/'g.csv', f'id,pat,{one}', 'a,1,1', 'b,2,0')
    for ask in (dict(labels=two), dict(labels={'fx': two}), dict(findings=two), dict(keep=[two])):
        with pytest.raises(DataError, match='g.csv: there is no column'): from_csv(g, names, **ask)
    with pytest.raises(DataError, match='there is no column'): from_csv(g, dict(names, patient_id=two))
    words = write(tmp_path/'w.csv', f'{one},categories', 'x,Lung')
    with pytest.raises(DataError, match='w.csv: there is no column'): read_terms(words, chest_tree(), two)


def test_own_names_stand_for_one_column(tmp_path):
    f = write(tmp_path/'o.csv', 'id,pat,seen,view', 'a,1,PA,1')
    names = dict(image_id='id', patient_id='pat', view='seen')
    with pytest.raises(DataError, match="'view' is asked for twice, as the columns 'seen' and 'view'"):
        from_csv(f, names, 'view')
    with pytest.raises(DataError, match="'view' is asked for twice"): from_csv(f, names, keep=['view'])
    m = from_csv(f, names, {'lateral': 'view'}).manifest
    assert (m.view[0], m.lateral[0])==('PA', 1)


def test_rows_of_ones_own_image_agree(tmp_path):
    f = write(tmp_path/'b.csv', 'id,pat,study,part,x,y,w,h,fx', 'a,1,s,train,1,1,5,5,1',
        'a,2,s,train,2,2,5,5,0',
        'b,,s,train,1,1,5,5,0', 'b,3,t,test,2,2,5,5,no', 'c,4,u,,3,3,5,5,yes', 'c,4.0,,valid,4,4,5,5,')
    names = dict(image_id='id', patient_id='pat', study_id='study', split='part', x1='x', y1='y', w='w',
        h='h')
    with pytest.raises(DataError,
            match="line 2 .image a., column 'patient_id': '1' here, '2' in another row"):
        from_csv(f, names, 'fx')
    ds = from_csv(f, names, 'fx', errors='list')
    assert where(ds)==[(2, 'patient_id'), (3, 'patient_id'), (4, 'study_id'), (5, 'study_id'), (4, 'split'),
        (5, 'split')]
    m = ds.manifest
    assert m[['image_id', 'patient_id']].values.tolist()==[['b', '3'], ['c', '4']]
    assert m.study_id.fillna('').tolist()==['', 'u'] and m.split.fillna('').tolist()==['', 'valid']
    assert m.fx.tolist()==[0, 1] and ds.boxes.image_id.tolist()==['b', 'b', 'c', 'c']


@pytest.mark.parametrize('nobody', ['', '<NA>', 'unknown', '-', '8.3986E+35'])
def test_what_is_no_patient_of_ones_own(tmp_path, nobody):
    f = write(tmp_path/'o.csv', 'id,pat,x,y,w,h,Fx', f'a,{nobody},1,1,5,5,Yes', 'b,7,1,1,5,5,"0,0"')
    names = dict(image_id='id', patient_id='pat', x1='x', y1='y', w='w', h='h')
    with pytest.raises(DataError, match="line 2 .image a., column 'patient_id': "): from_csv(f, names, 'Fx')
    assert quiet(from_csv, f, names, 'Fx', no_patient='image').manifest.patient_id.tolist()==['a', '7']
    ds = quiet(from_csv, f, names, 'Fx', no_patient='drop')
    assert ds.manifest[['patient_id', 'Fx']].values.tolist()==[['7', 0]] and ds.boxes.image_id.tolist()==['b']
    assert not len(ds.problems)
    siim = write(tmp_path/'s.csv', 'ImageId, EncodedPixels', '1.2,-1', '1.3,-1')
    index = pd.DataFrame({'SOPInstanceUID': ['1.2', '1.3'], 'PatientID': ['p', nobody],
        'StudyInstanceUID': 's',
        'path': ['x/a.dcm', 'x/b.dcm'], 'view': 'PA', 'laterality': ''})
    with pytest.warns(UserWarning, match='each of the 1 counts'):
        assert siim_pneumothorax(siim, index=index).manifest.patient_id.tolist()==['p', '1.3']


def test_files_that_belong_to_no_image_are_listed(tmp_path):
    for name in ('im/a.png', 'im/b.png', 'im/deep/new.png', 'im/._a.png', '__MACOSX/im/a.png', 'im/notes.txt',
            'im/a_mask.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'-')
    f = write(tmp_path/'o.csv', 'file,pat,Fx', 'a.png,1,1', 'b.png,2,0', 'gone.png,3,0')
    names = dict(path='file', patient_id='pat')
    with pytest.warns(UserWarning, match='2 files in the folder of images belong to no image'):
        ds = from_csv(f, names, 'Fx', images=tmp_path, errors='list')
    assert ds.manifest.image_id.tolist()==['a.png', 'b.png']
    assert sorted((p.value.split('im/')[-1], p.problem[:9]) for p in ds.problems.itertuples())==[
        ('a_mask.png', 'this file'), ('deep/new.png', 'this file'), ('gone.png', 'there is ')]
    (tmp_path/'im/deep/new.png').unlink()
    (tmp_path/'im/a_mask.png').unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(from_csv(write(f, 'file,pat,Fx', 'a.png,1,1', 'b.png,2,0'), names, 'Fx',
            images=tmp_path).problems)==0


# What was drawn on

def test_boxes_carry_the_size_that_they_were_drawn_on(tmp_path):
    boxes = write(tmp_path/'b.csv', 'Image Index,Finding Label,Bbox [x,y,w,h]', '0_0.png,Mass,1,1,9,9')
    assert chestxray14(nih(tmp_path/'n.csv', 'Mass'),
        boxes).boxes[['width', 'height']].values.tolist()==[[1024,
        1024]]
    rsna = write(tmp_path/'l.csv', 'patientId,x,y,width,height,Target', 'a,1,2,30,40,1')
    b = quiet(rsna_pneumonia, rsna).boxes
    assert b[[*XYXY, 'width', 'height']].values.tolist()==[[1, 2, 31, 42, 1024, 1024]]
    siim = write(tmp_path/'s.csv', 'ImageId, EncodedPixels', '1.2,5 5')
    assert quiet(siim_pneumothorax, siim).masks[['width', 'height']].values.tolist()==[[1024, 1024]]
    vin = write(tmp_path/'v.csv', VINDR_HEAD, 'a,R1,ILD,1,1,9,9', 'b,R1,ILD,1,1,9,9')
    for iou in (.4, None):
        b = quiet(vinbig, vin, {'a': (20, 30)}, iou).boxes
        assert b[['width', 'height']].fillna(0).values.tolist()==[[30, 20], [0, 0]]
    assert 'width' not in quiet(vinbig, vin).boxes
    f = write(tmp_path/'o.csv', 'id,pat,x,y,b,h,H,W', 'a,1,0,0,5,5,50,60', 'c,2,0,0,5,5,,')
    names = dict(image_id='id', patient_id='pat', x1='x', y1='y', w='b', h='h', height='H', width='W')
    assert from_csv(f, names).boxes[['width', 'height']].fillna(0).values.tolist()==[[60, 50], [0, 0]]


def test_classes_and_boxes_in_two_spellings(tmp_path):
    for name in ('train/NORMAL/p1.png', 'train/NORMAL/p2.png', 'val/normal/p3.png', 'val/Lung_Mass/p4.png',
            'train/lung mass/p5.png', 'train/lung mass/p6.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'-')
    levels = dict(levels=('split', 'label'), patient=r'(p\d)')
    assert from_folders(tmp_path, **levels).labels==('NORMAL', 'lung mass')
    ds = from_folders(tmp_path, **levels, classes=['Normal', 'Lung mass'])
    assert ds.labels==('Normal', 'Lung mass') and ds.manifest[['Normal', 'Lung mass']].sum().tolist()==[3, 3]
    f = write(tmp_path/'b.csv', 'id,pat,what,x,y,w,h', 'a,1,Mass,1,1,5,5', 'a,1,MASS,2,2,5,5',
        'b,2,Mass,1,1,5,5')
    names = dict(image_id='id', patient_id='pat', label='what', x1='x', y1='y', w='w', h='h')
    assert from_csv(f, names).boxes.label.tolist()==['Mass']*3


# Uncertain labels and trees

def test_soft_values_lie_between(tmp_path):
    for soft in (0, 1, (0, .5), (.5, 1), (.8, .2), (np.nan, .5), -.1):
        with pytest.raises(DataError, match='soft is'): resolve_uncertain([-1.], 'soft', soft)
    assert 0<resolve_uncertain(np.full(999, -1.), 'soft').min() and resolve_uncertain([-1.], 'ones',
        (0, 1))==[1]
    f = write(tmp_path/'t.csv', CHEX, chex_line('a/train/patient1/study1/view1_frontal.jpg', Edema=-1.0,
        Pneumonia=0.0,
        Pleural_Effusion=1.0))
    m = chexpert(f, 'soft', tree=chest_tree())
    assert m.labels==chest_tree().names and not set(CHEXPERT)-set(chest_tree().names) & set(m.manifest)
    r = m.manifest.iloc[0]
    assert .55<=r['Lung-urgent']<.85 and r.Lung==r['Lung-urgent'] and r[
        'Pleural effusion']==1 and r.Pneumonia==0
    assert r.Normal==0 and chest_tree().contradictions(m.manifest)==[]


def test_a_parent_is_at_least_as_likely_as_its_children():
    tree = chest_tree()
    df = pd.DataFrame({'Pneumonia': [.7, .7, .7, .7, .2], 'Atelectasis': [.8, 0, 1, np.nan, .3],
        'Lung-urgent': [np.nan, .6, .6, 0, .9], 'Normal': [np.nan, np.nan, np.nan, np.nan, 1]})
    closed = tree.close(df, errors='unknown')
    assert closed['Lung-urgent'].fillna(-1).tolist()==[.8, .7, 1, -1,
        -1] and closed.Lung.fillna(-1).tolist()==[.8, .7, 1,
        -1, -1]
    assert closed.Normal.fillna(-1).tolist()==[-1, -1, 0, -1, -1]
    why = [w for *_,w in tree.contradictions(df)]
    assert "is 0.7, and 'Lung-urgent' above it is 0" in why and "is 0.2, and 'Normal' is 1" in why
    pd.testing.assert_frame_equal(tree.close(closed), closed)
    for v in (-.1, 1.1, 2):
        with pytest.raises(DataError, match="Row 0, column 'Mass'"): tree.close(pd.DataFrame({'Mass': [v]}))


@pytest.mark.parametrize('seed', range(10))
def test_triage_and_close_agree_about_no_finding(seed):
    gen,tree = np.random.default_rng(seed),chest_tree()
    df = pd.DataFrame(gen.choice([0, 1, np.nan, .6], (200, 32), p=[.8, .02, .17, .01]),
        columns=list(tree.names))
    df.loc[:99, list(np.array(tree.names)[tree.disease])] = 0.
    closed,tier = tree.close(df, errors='unknown'),tree.triage(df)
    assert ((closed.Normal==1)==(tier=='no pathology')).all() and (tier[:100]!='urgent').all()
    assert (tree.triage(closed)==tier).all()
    torn = {r for r,*_ in tree.contradictions(df)}
    assert torn and (tier[sorted(torn)]=='').all() and set(df.index[(df.Normal==0)][:20]) & set(
        range(100)) <= torn | set(
        range(100, 200))


def test_no_finding_of_chestxray14_has_the_lowest_tier(tmp_path):
    tree = chest_tree()
    m = chestxray14(nih(tmp_path/'n.csv', 'No Finding', 'Mass', 'Pneumonia', ''), tree=tree).manifest
    assert tree.triage(m).tolist()==['no pathology', '', 'urgent',
        ''] and tree.close(m).Normal.fillna(-1).tolist()==[1, 0,
        0, -1]


@pytest.mark.parametrize('tree, words', [
    ((('a', 'b', 'c'), ('b', 'c', 'a'), ('',)*3), "'a' stands below itself"),
    ((('a',), ('a',), ('',)), "'a' stands below itself"),
    ((('Lung', 'a', 'lung '), ('', 'Lung', ''), ('',)*3), "'Lung' and 'lung ' have one name"),
    ((('Lung-urgent', 'a', 'Lung urgent'), ('', '', ''), ('',)*3), 'have one name'),
    ((('a', 'a'), ('', ''), ('', '')), "'a' twice"), ((('a', 'b'), ('',), ('', '')), '2 names, 1 parents'),
    ((('Heart', 'b'), ('', 'Haert'), ('', '')),
    "The parent 'Haert' of 'b' is no category; did you mean 'Heart'"),
    ((('a', 'b'), ('', ''), ('x', 'z'), ('x', 'y')), "tier 'z' of 'b' is not in the order"),
    ((('a', 'b'), ('', ''), ('x', 'y'), ('x', 'y', 'x')), 'names a tier twice'),
    ((('a', 'b'), ('', ''), ('x', 'y'), ('x', 'y'), 'c'), "normal is 'c', which is no category"),
    ((('a', 'b'), ('', ''), ('x', 'y'), ('x', 'y'), 'b'), "'b' is not of the lowest tier"),
    ((('a', 'b'), ('', ''), ('x', 'y'), (), 'a'), "'a' is not of the lowest tier"),
    ((('a', 'b'), ('', 'a'), ('x', 'y'), ('x', 'y'), 'a'), "'b' and 'a' exclude one another"),
    ((('a', 'b'), ('b', ''), ('x', 'y'), ('x', 'y'), 'a'), "'b' and 'a' exclude one another")])
def test_what_is_no_tree_is_refused(tree, words):
    with pytest.raises(DataError, match=words): LabelTree(*tree)


def test_a_mapping_belongs_to_its_tree():
    mine = LabelTree(['Chest', 'Water'], ['', 'Chest'], ['', ''])
    said = pd.Series(['Effusion'])
    with pytest.raises(DataError, match="'atelectasis' means 'Atelectasis', which is no category"):
        mine.from_terms(said, chest_terms('nih14'), [0])
    with pytest.raises(DataError, match="the term 'EFFUSION' twice"):
        mine.from_terms(said, {'effusion': ('Water',), 'EFFUSION': ('Chest',)}, [0])
    assert mine.from_terms(said, {'effusion': ('Water',)}, [0]).values.tolist()==[[1, 1]]
    # a word that the mapping lacks leaves unknown what its image does not name
    out = chest_tree().from_terms(pd.Series(['Mass', 'Masses', 'mass'], [0, 0, 1]), chest_terms('nih14'),
        range(2))
    assert out.Mass.tolist()==[1, 1] and np.isnan(out.Pneumonia[0]) and out.Pneumonia[1]==0
    with pytest.raises(DataError, match="no column 'effusion'; did you mean 'Efusion'"):
        mine.from_labels(pd.DataFrame({'Efusion': [1]}), {'effusion': ('Water',)})
    with pytest.raises(DataError,
            match="Choose one of nih14, padchest, chexpert|Choose one of padchest, nih14, chexpert"):
        chest_terms('vinbig')
    with pytest.raises(DataError, match='no order of tiers'): mine.triage(pd.DataFrame({'Water': [1]}))


def test_labels_of_chexpert_in_the_tree():
    tree,terms = chest_tree(),chest_terms('chexpert')
    assert set(terms)=={c.lower() for c in CHEXPERT[1:]}
    parent = dict(zip(tree.names, tree.parents))
    for cats in terms.values(): assert all(parent[c] in ('', *cats) for c in cats)
    gen = np.random.default_rng(0)
    df = pd.DataFrame(gen.choice([0, 1, np.nan, .7], (300, 14)), columns=list(CHEXPERT))
    v = tree.from_labels(df, terms)
    assert tree.contradictions(v)==[]
    for c,words in (('Infiltrates', ['Consolidation']), ('Pneumothorax', ['Pneumothorax']),
            ('Lung-urgent', ['Lung Lesion', 'Edema', 'Consolidation', 'Pneumonia', 'Atelectasis'])):
        known = v[c].notna()
        top = df[words].max(axis=1)
        free = known & (df['No Finding']!=1)
        assert (v[c][free]==top[free]).all() and (v[c][known & (df['No Finding']==1)]==0).all()
    assert v.Hila.isna().all() and (v.Normal[(df[list(CHEXPERT[1:-1])]==1).any(axis=1)]!=1).all()


def test_own_tree_and_words(tmp_path):
    f = write(tmp_path/'t.csv', 'Category,Parent,Tier', 'Chest,,later', 'Water,Chest,urgent', 'Well,,nothing')
    tree = read_tree(f, ['nothing', 'later', 'urgent'], 'Well')
    assert (tree.names, tree.parents, tree.normal)==(('Chest', 'Water', 'Well'), ('', 'Chest', ''), 'Well')
    terms = read_terms(write(tmp_path/'w.csv', 'term,categories', 'Effusion,Water', 'Mass,Chest', 'Hernia,'),
        tree)
    assert terms=={'Effusion': ('Chest', 'Water'), 'Mass': ('Chest',), 'Hernia': ()}
    m = chestxray14(nih(tmp_path/'n.csv', 'pleural effusion', 'No Finding', 'Mass', 'Hernia'), tree=tree,
        terms=terms).manifest
    assert m[['Chest', 'Water', 'Well']].fillna(-1).values.tolist()==[[1, 1, 0], [0, 0, 1], [1, 0, 0],
        [0, 0, -1]] or (
        tree.triage(m).tolist()[:3]==['urgent', 'nothing', 'later'])
    with pytest.raises(DataError, match="'atelectasis' means"): chestxray14(tmp_path/'n.csv', tree=tree)
    bad = write(tmp_path/'x.csv', 'category,parent,tier', 'Chest,,later', 'chest,,later', ',Chest,later',
        'Lung,Chets,soon')
    with pytest.raises(DataError, match="line 3.*'category': this category was there before") as e:
        read_tree(bad, ['later'])
    for words in ("line 4, column 'category': is missing", "line 5, column 'parent': 'Chets'",
            "line 5, column 'tier': 'soon'"):
        assert words in str(e.value)
    with pytest.raises(DataError,
            match="line 2, column 'categories': 'Watr' is no category.*did you mean 'Water'"):
        read_terms(write(tmp_path/'y.csv', 'term,categories', 'Effusion,Watr'), tree)
    with pytest.raises(DataError, match='has no category'):
        read_tree(write(tmp_path/'e.csv', 'category,parent'))


def test_the_tree_is_the_one_of_the_reference(tmp_path):
    reference = chest_tree()
    rows = [f'{c},{p},{t}' for c,p,t in zip(reference.names, reference.parents, reference.tiers)]
    f = write(tmp_path/'c.csv', 'category,parent,tier', *rows)
    assert read_tree(f, reference.order, 'Normal')==reference


# Files as people have them

def test_the_sample_of_kaggle(tmp_path):
    f = write(tmp_path/'sample_labels.csv', NIH
        + ',OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,'
        'OriginalImagePixelSpacing_y',
        '00000013_005.png,Emphysema|Infiltration|Pleural_Thickening|Pneumothorax,005,00013,'
        '060Y,M,AP,3056,2544,0.139,0.139')
    r = chestxray14(f).manifest.iloc[0]
    assert (r.age, r.original_width, r.original_height, r.original_spacing, r['view'], r.Emphysema)==(60,
        3056, 2544, .139,
        'AP', 1)
    true = write(tmp_path/'Data_Entry_2017.csv',
        NIH + ',OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]',
        '1_0.png,Mass,0,1,57,M,PA,2682,2749,0.143,0.144')
    r = chestxray14(true).manifest.iloc[0]
    assert (r.original_width, r.original_height, r.original_spacing)==(2682, 2749, .143)
    assert 'original_width' not in chestxray14(nih(tmp_path/'n.csv', 'Mass')).manifest


VINDR_HEAD = 'image_id,rad_id,class_name,x_min,y_min,x_max,y_max'


def test_physionet_vindr(tmp_path):
    boxes = write(tmp_path/'annotations_train.csv', VINDR_HEAD, 'a,R1,Rib fracture,1,1,9,9',
        'a,R2,Rib fracture,1,1,9,9',
        'b,R1,No finding,,,,', 'b,R2,No finding,,,,')
    ds = quiet(vinbig, boxes)
    assert set(VINDR[14:22]) < set(ds.labels) and 'COPD' not in ds.labels and len(ds.boxes)==1
    assert ds.manifest['Rib fracture'].tolist()==[1, 0] and ds.manifest.path.tolist()==['a.dicom', 'b.dicom']
    labels = write(tmp_path/'image_labels_train.csv',
        'image_id,rad_id,' + ','.join([*VINDR[:-1], 'Other diseases',
        'No finding']), *(f'{i},{r},' + ','.join(str(int(c in says)) for c in (*VINDR, 'No finding'))
        for i,r,says in (('a', 'R1', {'Rib fracture', 'Tuberculosis'}),
        ('a', 'R2', {'Rib fracture', 'Tuberculosis'}),
        ('a', 'R3', {'Tuberculosis'}), ('b', 'R1', {'No finding'}), ('b', 'R2', {'No finding', 'COPD'}),
        ('c', 'R1', {'Pneumonia'}))))
    with pytest.raises(DataError, match="line 6 .*'No finding': is 1 beside a finding"):
        quiet(vinbig, boxes, image_labels=labels)
    ds = quiet(vinbig, boxes, image_labels=labels, errors='list')
    m = ds.manifest.set_index('image_id')
    assert ds.labels==(*VINDR, 'No finding') and m.n_readers.tolist()==[3, 2, 1]
    assert (m.Tuberculosis['a'], m['Rib fracture']['a'], m.COPD['a'], m.Pneumonia['c'])==(1, 1, 0, 1)
    assert m.loc['b', list(ds.labels)].isna().all() and ds.boxes.score.round(2).tolist()==[.67]


def test_physionet_vindr_test_set_names_no_readers(tmp_path):
    boxes = write(tmp_path/'annotations_test.csv', 'image_id,class_name,x_min,y_min,x_max,y_max',
        'a.dicom,Lung cyst,1,1,9,9',
        'b.dcm,No finding,,,,')
    labels = write(tmp_path/'image_labels_test.csv', 'image_id,Lung cyst,Other disease,No finding', 'a,1,1,0',
        'b,0,0,1')
    ds = quiet(vinbig, boxes, image_labels=labels, sizes={'a': (20, 30), 'b': (20, 30)})
    assert ds.manifest.image_id.tolist()==['a', 'b'] and ds.manifest['Lung cyst'].tolist()==[1, 0]
    assert ds.labels==('Lung cyst', 'Other diseases',
        'No finding') and ds.boxes.readers.tolist()==['consensus']
    assert ds.manifest[['height', 'width']].values.tolist()==[[20, 30]]*2
    # Kaggle's file without its readers is no consensus
    with pytest.raises(DataError, match="no column 'rad_id'"):
        quiet(vinbig, write(tmp_path/'k.csv', 'image_id,class_name,class_id,x_min,y_min,x_max,y_max',
            'a,ILD,5,1,1,9,9'))
    with pytest.raises(DataError, match='no column of a finding'):
        quiet(vinbig, boxes, image_labels=write(tmp_path/'l.csv', 'image_id,No finding', 'a,1'))


@pytest.mark.parametrize('names', ['image_id,height,width', 'Image Index,Height,Width', 'image,rows,cols',
    'file_name,Rows,Columns', 'image_id,dim0,dim1', 'id,original_height,original_width',
    'filename,OriginalImageHeight,OriginalImageWidth', 'image_id,image_height,image_width',
    'Path,Height],OriginalImage[Width'])
def test_sizes_in_the_usual_names(tmp_path, names):
    t = image_sizes(write(tmp_path/'s.csv', names, 'x/a.dicom,20,30', r'x\b.png,21,31', 'c,22,32'))
    assert t.values.tolist()==[['a', 20, 30], ['b', 21, 31], ['c', 22, 32]]
    a,h,w = names.split(',')
    assert image_sizes(pd.DataFrame({w: [30], a: ['a'], h: [20]})).values.tolist()==[['a', 20, 30]]


def test_bad_sizes(tmp_path):
    for t,words in ((pd.DataFrame({'image_id': ['a'], 'height': [1]}),
            'no column says the width: none of width, cols'),
            (pd.DataFrame({'x': ['a'], 'height': [1], 'width': [1]}), 'no column says the image_id'),
            (tmp_path/'none.csv', 'no table of sizes'), (7, 'no table of sizes 7')):
        with pytest.raises(DataError, match=words): image_sizes(t)
    bad = pd.DataFrame({'image_id': list('abca'), 'height': [5, 0, 'x', 6], 'width': [5, 5, 5, 5]})
    with pytest.raises(DataError, match="column 'height': 0 is no number of pixels"): image_sizes(bad)
    found = []
    assert image_sizes(bad, found).height.fillna(-1).tolist()==[5, -1,
        -1] and [(p.row, p.column) for p in found]==[(1,
        'height'), (2, 'height'), (3, 'image_id')]


READINGS = ['ID|SIDE|READPRJ|VERSION|V00BARCDBU|V00XRKL|V00XRJSM', '9000001|1: Right|37|0.9|016|3|1: 1',
    '9000001|1: Right|15|0.9|016|2|1: 1',
    '9000001|2: Left|15|0.9|016|.: Missing Form/Incomplete Workbook|0: 0',
    '9000001|2: Left|42|0.9|016|1|0: 0', '9000002|2|15|0.9|016|4: 4|3',
    '9000003|1|15|0.9|016|.A: Not Expected|0']


@pytest.mark.parametrize('upper', [str.upper, str.lower])
@pytest.mark.parametrize('folder', [True, False])
def test_readings_of_the_osteoarthritis_initiative(tmp_path, upper, folder):
    f = write(tmp_path/('kXR_SQ_BU00.txt' if upper is str.upper else 'kxr_sq_bu00.txt'), upper(READINGS[0]),
        *READINGS[1:])
    with pytest.warns(UserWarning, match='1 odd cell'): ds = oai_knees(tmp_path if folder else f)
    m = ds.manifest.set_index('image_id')
    assert m.index.tolist()==['9000001R', '9000001L', '9000002L', '9000003R']
    assert m.kl.fillna(-1).tolist()==[2, 1, 4, -1] and m.laterality.tolist()==['R', 'L', 'L', 'R']
    assert m.readings.tolist()==[2, 2, 1, 1] and m.read_project.tolist()==['15', '42', '15', '15']
    assert m.patient_id.tolist()==['9000001']*2 + ['9000002', '9000003'] and (m.visit=='00').all()
    assert where(ds)==[(3, 'kl')] and ds.problems.problem[0].endswith('is one of several grades of this knee')
    (tmp_path/'0').mkdir()
    for knee in m.index: (tmp_path/f'0/{knee}.jpg').touch()
    assert quiet(oai_knees, f, images=tmp_path).manifest.path.str.endswith('.jpg').all()


def test_bad_readings(tmp_path):
    f = write(tmp_path/'kxr_sq_bu00.txt', READINGS[0], *READINGS[1:], '9000004|3: Both|15|0.9|016|2|1',
        '9000005|1|15|0.9|016|9|1')
    ds = quiet(oai_knees, f, errors='list')
    assert [p for p in where(ds) if p[1]!='kl' or p[0]!=3]==[(8, 'SIDE'), (9, 'kl')] and len(ds.manifest)==5
    for head,words in (('ID|READPRJ|V00XRKL', 'no column SIDE'),
            ('ID|SIDE|READPRJ|V00XRJSM', 'no column V00XRKL'),
            ('ID|SIDE|V00XRKL|V01XRKL', 'several visits: V00XRKL, V01XRKL')):
        with pytest.raises(DataError, match=words):
            oai_knees(write(tmp_path/'odd.txt', head, '|'.join(['1']*head.count('|') + ['1'])))
    with pytest.raises(DataError, match='has nothing that fits a knee'):
        oai_knees(write(tmp_path/'odd.txt', READINGS[0], '1|7|15|0|0|1|1'))


@pytest.mark.parametrize('path, split', [
    ('CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg', 'train'),
    ('CheXpert-v1.0-small/valid/patient00001/study1/view1_frontal.jpg', 'valid'),
    ('CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg', 'train'),
    ('CheXpert/chexpertchestxrays-u20210408/CheXpert-v1.0 batch 4 (train 3)/patient00001/study1/view1_frontal.jpg', 'train'),
    ('CheXpert-v1.0 batch 1 (validate & csv)/valid/patient00001/study1/view1_frontal.jpg', 'valid'),
    (r'CheXpert-v1.0\train\patient00001\study1\view1_frontal.jpg', 'train'),
    (r'D:\data\CheXpert-v1.0 batch 3 (train 2)\patient00001\study1\view1_frontal.jpg', 'train'),
    ('patient00001/study1/view1_frontal.jpg', ''), ('test/patient00001/study1/view1_frontal.jpg', 'test')])
def test_paths_of_chexpert(tmp_path, path, split):
    f = write(tmp_path/'t.csv', CHEX, chex_line(path, Edema=1.0))
    there = tmp_path/'CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg'
    there.parent.mkdir(parents=True)
    there.touch()
    for images in (None, tmp_path):
        r = chexpert(f, images=images).manifest.iloc[0]
        assert (r.image_id, r.patient_id, r.study_id, r.split, r.Edema)==('patient00001/study1/view1_frontal',
            'patient00001', 'patient00001/study1', split, 1)
    assert r.path==str(there)


def test_what_fits_no_pattern_says_what_was_looked_for(tmp_path):
    chex = write(tmp_path/'t.csv', CHEX, chex_line('images/1.jpg', Edema=1.0))
    with pytest.raises(DataError,
            match='none of its 1 rows has a path that ends in patient00001.*images/1.jpg'):
        chexpert(chex)
    (tmp_path/'knees/a/b/c').mkdir(parents=True)
    (tmp_path/'knees/a/b/c/x.png').write_bytes(b'-')
    with pytest.raises(DataError,
            match='has nothing that fits manifest.csv, kxr_sq_bu00.txt or .split/.grade/patient'):
        oai_knees(tmp_path/'knees')
    with pytest.raises(DataError, match='has nothing that fits label/file: .*another depth'):
        from_folders(tmp_path/'knees')
    with pytest.raises(DataError, match="has nothing that fits the patient"), pytest.warns(UserWarning,
            match='left out'):
        from_folders(tmp_path/'knees', ('', '', 'label'), patient=r'(p\d+)', no_patient='drop')
    f = write(tmp_path/'o.csv', 'id,pat,Fx', 'a,,1')
    with pytest.raises(DataError,
            match='has nothing that fits an image of a patient'), pytest.warns(UserWarning):
        from_csv(f, dict(image_id='id', patient_id='pat'), 'Fx', no_patient='drop')
    with pytest.raises(DataError, match="there is no column 'Fy[?]'"):
        from_csv(f, dict(image_id='id', patient_id='pat'), 'Fy?', no_patient='image')
    head = 'image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max'
    with pytest.raises(DataError, match='none of its 1 rows has a reader and a known finding'):
        vinbig(write(tmp_path/'v.csv', head, 'a,Strange,0,R1,1,1,9,9'))
    siim = write(tmp_path/'s.csv', 'ImageId, EncodedPixels', '1.2,-1')
    index = pd.DataFrame({'SOPInstanceUID': ['9'], 'PatientID': ['p'], 'StudyInstanceUID': ['s'],
        'path': ['z.dcm'], 'view': '',
        'laterality': ''})
    with pytest.raises(DataError,
            match='none of its 1 rows has a SOPInstanceUID or file name of the 1 of the index'):
        siim_pneumothorax(siim, index=index)


def stored(path, how):
    "The CSV `path` in another form, all cells as text."
    t = pd.read_csv(path, dtype=str, keep_default_na=False)
    if how=='zip':
        with zipfile.ZipFile(f'{path}.zip', 'w') as z: z.write(path, path.name)
        return f'{path}.zip'
    if how in ('xlsx', 'parquet'):
        getattr(t, f'to_{how}'.replace('xlsx', 'excel'))(path.with_suffix(f'.{how}'), index=False)
        return path.with_suffix(f'.{how}')
    if how=='semicolon':
        path.write_text('\n'.join(';'.join([*r, '', '']) for r in [t.columns, *t.values]) + '\n')
    if how=='tail': path.write_text(path.read_text().replace('\n', ',,,\n'))
    if how=='quoted':
        path.write_text('\n'.join(';'.join(f'"{c}"' for c in r)
            for r in [[*t.columns, 'a, b, c, d, e, f, g, h'],
            *(t.assign(x='').values)]) + '\n')
    return path


@pytest.mark.parametrize('how', ['zip', 'xlsx', 'parquet', 'semicolon', 'tail', 'quoted'])
def test_one_table_in_every_form(tmp_path, how):
    m = chestxray14(stored(nih(tmp_path/'n.csv', 'Mass|Effusion', 'no finding'), how)).manifest
    assert m.patient_id.tolist()==['0', '1'] and m[['Mass', 'Effusion', 'Hernia']].values.tolist()==[[1, 1,
        0], [0, 0, 0]]
    assert m.age.tolist()==[50, 50]
    f = stored(own(tmp_path/'o.csv', 'Mass|effusion', 'none'), how)
    ds = from_csv(f, dict(image_id='id', patient_id='pat'), findings='words', vocab=['Mass', 'Effusion'],
        nothing=['None'])
    assert ds.manifest[['Mass', 'Effusion']].values.tolist()==[[1, 1], [0, 0]]
    f = stored(write(tmp_path/'r.csv', 'ID,SIDE,READPRJ,V00XRKL', '9000001,1: Right,15,2'), how)
    assert oai_knees(f).manifest[['image_id', 'kl']].values.tolist()==[['9000001R', 2]]
    sizes = image_sizes(stored(write(tmp_path/'s.csv', 'image_id,dim0,dim1', 'a,20,30'), how))
    assert sizes.values.tolist()==[['a', 20, 30]]


def test_the_companion_of_macos_is_no_table(tmp_path):
    nih(tmp_path/'._n.csv', 'Mass')
    with pytest.raises(DataError, match='macOS'): chestxray14(tmp_path/'._n.csv')


@pytest.mark.parametrize('adapter', [chestxray14, padchest, chexpert, rsna_pneumonia, siim_pneumothorax,
    vinbig])
@pytest.mark.parametrize('what', [None, 7, pd.DataFrame({'a': [1]}), ['x.csv']])
def test_what_is_no_path_is_said_so(adapter, what):
    with pytest.raises(DataError, match=f'A file of labels is expected, not a {type(what).__name__}'):
        adapter(what)


@pytest.mark.parametrize('what', [None, 7, pd.DataFrame({'a': [1]})])
def test_what_is_no_path_of_ones_own_is_said_so(tmp_path, what):
    for call in (from_folders, oai_knees, read_tree, lambda o: read_terms(o, chest_tree()),
            lambda o: from_csv(o, dict(image_id='id'))):
        with pytest.raises(DataError, match=f'is expected, not a {type(what).__name__}'): call(what)
    with pytest.raises(DataError, match='There is no file 7'):
        chestxray14(nih(tmp_path/'n.csv', 'Mass'), train_val=7)
    names = dict(image_id='id', patient_id='pat')
    one = from_csv(own(tmp_path/'o.csv', 'mass', 'normal'), names, findings='words', vocab='Mass',
        nothing='Normal')
    assert one.labels==('Mass',) and one.manifest.Mass.tolist()==[1, 0]


@pytest.mark.parametrize('adapter', [chestxray14, padchest, chexpert, rsna_pneumonia, siim_pneumothorax,
    vinbig])
def test_a_table_of_something_else_names_the_column(tmp_path, adapter):
    with pytest.raises(DataError, match='odd.csv: there is no column'):
        adapter(write(tmp_path/'odd.csv', 'Patient,Diagnosis', '1,flu'))
    with pytest.raises(DataError, match='There is no file'): adapter(tmp_path)


def test_what_macos_keeps_beside_files_is_no_image(tmp_path):
    for name in ('a/p1.png', 'a/._p1.png', '__MACOSX/a/p1.png', '.__x.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'-')
    assert from_folders(tmp_path, patient=r'(p\d)', errors='list').manifest.image_id.tolist()==['a/p1.png']


def test_back_slashes(tmp_path):
    (tmp_path/'images/a').mkdir(parents=True)
    (tmp_path/'images/a/p1.png').touch()
    f = write(tmp_path/'o.csv', 'file,pat,Fx', r'images\a\p1.png,1,1')
    ds = from_csv(f, dict(path='file', patient_id='pat'), 'Fx', images=tmp_path)
    assert ds.manifest.path.tolist()==[f'{tmp_path}/images/a/p1.png']
    write(tmp_path/'manifest.csv', 'path,kl,patient,side', r'images\a\p1.png,2,9,L')
    assert oai_knees(tmp_path).manifest.path.tolist()==[f'{tmp_path}/images/a/p1.png']


# Images that are no persons

def test_images_are_no_persons(tmp_path):
    rsna = write(tmp_path/'l.csv', 'patientId,x,y,width,height,Target', 'a,,,,,0', 'b,,,,,0')
    siim = write(tmp_path/'s.csv', 'ImageId, EncodedPixels', '1.2,-1', '1.3,-1')
    vin = write(tmp_path/'v.csv', VINDR_HEAD, 'a,R1,No finding,,,,', 'b,R1,ILD,1,1,9,9')
    for call,remedy in ((lambda **k: rsna_pneumonia(rsna, **k), 'match='),
            (lambda **k: siim_pneumothorax(siim, **k), 'index='),
            (lambda **k: vinbig(vin, **k), 'index=')):
        with pytest.warns(UserWarning, match=f'images, not persons: each of the 2 .*{remedy}'): call()
    match = write(tmp_path/'m.csv', 'pid,nih,mse', 'a,00000001_000.png,1', 'b,00000001_001.png,1')
    index = pd.DataFrame({'SOPInstanceUID': ['1.2', '1.3'], 'PatientID': ['p', 'p'],
        'StudyInstanceUID': ['s', 't'],
        'path': ['x/a.dicom', 'x/b.dicom'], 'view': 'PA', 'laterality': ''})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert rsna_pneumonia(rsna, match=match).manifest.patient_id.tolist()==['1', '1']
        assert siim_pneumothorax(siim, index=index).manifest.patient_id.tolist()==['p', 'p']
        ds = vinbig(vin, index=index) # by the names of its files
        assert ds.manifest.patient_id.tolist()==['p', 'p'] and ds.manifest.path.tolist()==['x/a.dicom',
            'x/b.dicom']
        assert ds.boxes[XYXY].values.tolist()==[[1, 1, 9, 9]] and ds.boxes.image_id.tolist()==['b']
    with pytest.warns(UserWarning, match='each of the 1 counts .*m.csv does not name them'):
        rsna_pneumonia(rsna, match=write(tmp_path/'m.csv', 'pid,nih,mse', 'a,00000001_000.png,1'))
    for nobody in ('', None):
        with pytest.warns(UserWarning, match='each of the 1 counts .*headers of the index name no patient'):
            m = siim_pneumothorax(siim, index=index.assign(PatientID=['p', nobody])).manifest
        assert m.patient_id.tolist()==['p', '1.3']
