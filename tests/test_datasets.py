"""Public data sets, label trees, boxes and masks: the true label files against what their raw lines say, and
every bad input by name."""
import gzip
import warnings

import fastai.vision.all  # noqa: F401 (it changes PIL's `size`, in whatever order the tests run)
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from radiology_ai.core import DataError
from radiology_ai.data.cells import read_labels
from radiology_ai.data.chest import (
    CHEXPERT,
    NIH14,
    RSNA,
    VINBIG,
    chestxray14,
    chexpert,
    padchest,
    rsna_pneumonia,
    siim_pneumothorax,
    vinbig,
)
from radiology_ai.data.datasets import from_csv, from_folders, link, oai_knees
from radiology_ai.data.labels import find_images, manifest_problems
from radiology_ai.data.regions import XYXY, box_iou, fuse_boxes, image_mask, rle_area, rle_decode, rle_encode
from radiology_ai.data.tree import LabelTree, chest_terms, chest_tree, resolve_uncertain

NIH_HEADER = ('Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,'
    'OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]')


@pytest.fixture(scope='module')
def files(real_data): return real_data/'labels'


@pytest.fixture(scope='module')
def nih(files):
    return chestxray14(files/'nih/Data_Entry_2017_v2020.csv.gz', files/'nih/BBox_List_2017.csv.gz',
        files/'nih/google2019_nih-chest-xray-labels.csv.gz', files/'nih/train_val_list.txt.gz')


@pytest.fixture(scope='module')
def rsna(files):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return rsna_pneumonia(*(files/'rsna'/f'{f}.csv.gz'
            for f in ('stage_2_train_labels', 'stage_2_detailed_class_info',
            'stage_2_train_images_dicom_headers', 'rsna_to_nih_match')))


def row(dataset, image_id): return dataset.manifest.set_index('image_id').loc[image_id]
def positive(r, names): return {n for n in names if r[n]==1}


# ChestX-ray14

def test_nih_counts_are_the_published_ones(nih):
    m = nih.manifest
    assert (len(m), m.patient_id.nunique(), len(nih.boxes), nih.boxes.image_id.nunique(),
        len(nih.problems))==(112120, 30805, 984, 880, 0)
    assert m.split.value_counts().to_dict()=={'train': 86524, 'test': 25596}
    assert not set(m.patient_id[m.split=='train']) & set(m.patient_id[m.split=='test'])
    published = dict(Atelectasis=11559, Cardiomegaly=2776, Effusion=13317, Infiltration=19894, Mass=5782,
        Nodule=6331, Pneumonia=1431, Pneumothorax=5302, Consolidation=4667,
                     Edema=2303, Emphysema=2516, Fibrosis=1686, Pleural_Thickening=3385, Hernia=227)
    assert (m[list(NIH14)]==1).sum().to_dict()==published
    assert (m[list(NIH14)].sum(axis=1)==0).sum()==60361 # 'No Finding'
    assert nih.boxes.label.value_counts().to_dict()==dict(Atelectasis=180, Effusion=153, Cardiomegaly=146,
        Infiltration=123, Pneumonia=120, Pneumothorax=98, Mass=85, Nodule=79)
    assert manifest_problems(m, list(NIH14))==[]


def test_nih_rows_by_hand(nih):
    # 00010447_027.png,Cardiomegaly|Effusion|Infiltration,27,10447,63,F,AP,2500,2048,0.168,0.168
    r = row(nih, '00010447_027.png')
    assert positive(r, NIH14)=={'Cardiomegaly', 'Effusion', 'Infiltration'}
    assert (r.patient_id, r.age, r.sex, r['view'], r.original_width, r.original_height, r.original_spacing,
        r.followup)==('10447', 63, 'F', 'AP', 2500, 2048, .168, 27)
    r = row(nih, '00030805_000.png') # the last line: No Finding
    assert not positive(r, NIH14) and r[list(NIH14)].notna().all() and (r.patient_id, r.age)==('30805', 26)
    r = row(nih, '00000013_026.png') # adjudicated: NO,YES,NO,NO,test; the reports said Cardiomegaly|Emphysema
    assert [r[f'{c}_adjudicated'] for c in ('Fracture', 'Pneumothorax', 'Airspace opacity',
        'Nodule or mass')]==[0, 1, 0, 0]
    assert (r.Pneumothorax, r.adjudicated_set, r.split)==(0, 'test', 'test')
    assert np.isnan(row(nih, '00000001_000.png').Fracture_adjudicated)
    box = nih.boxes[nih.boxes.image_id=='00014716_007.png'] # 686.10,131.54,185.49,313.49
    np.testing.assert_allclose(box[XYXY].to_numpy(),
        [[686.101694915254, 131.543498411017, 686.101694915254+185.491525423729,
        131.543498411017+313.491525423729]])


def test_nih_editions_agree(files, nih):
    old = chestxray14(files/'nih/Data_Entry_2017.csv.gz').manifest
    new = nih.manifest.iloc[:len(old)]
    pd.testing.assert_frame_equal(old[['image_id', 'patient_id', *NIH14]],
        new[['image_id', 'patient_id', *NIH14]])
    variant = chestxray14(files/'nih/Data_Entry_2017_v2020.csv.gz',
        files/'nih/BBox_List_2017_variant.csv').boxes
    assert (variant[['image_id', 'label']]==nih.boxes[['image_id', 'label']]).all().all()
    np.testing.assert_allclose(variant[XYXY], nih.boxes[XYXY], atol=1e-5) # the variant writes fewer digits


def test_nih_against_another_reading(real_data, nih):
    other = pd.read_csv(real_data/'chest_nih/manifest.csv').set_index('image')
    ours = nih.manifest.set_index('image_id').loc[other.index]
    assert (ours[list(NIH14)].to_numpy()==other[list(NIH14)].to_numpy()).all()
    assert (ours.patient_id==other.patient_id.astype(str)).all() and (ours['view']==other['view']).all() and (
        ours.split=='train').all()
    for theirs,name in (('google_Fracture', 'Fracture'), ('google_Pneumothorax', 'Pneumothorax'),
            ('google_Airspace_opacity', 'Airspace opacity'), ('google_Nodule_or_mass', 'Nodule or mass')):
        assert ours[f'{name}_adjudicated'].fillna(-1).tolist()==other[theirs].map({'YES': 1.,
            'NO': 0.}).fillna(-1).tolist()


def test_nih_old_header_and_ages(tmp_path):
    f = tmp_path/'Data_Entry_2017.csv'
    f.write_text(f'{NIH_HEADER},\n1_0.png,Hernia|Mass,0,1,058Y,M,PA,2000,2500,.1,.1,\n2_0.png,No '
        'Finding,0,2,006M,F,AP,2000,2500,.1,.1,\n3_0.png,,0,3,414Y,F,AP,2000,2500,.1,.1,\n')
    with pytest.warns(UserWarning, match='1 odd cell, such as'): ds = chestxray14(f)
    assert ds.manifest.age.fillna(-1).tolist()==[58, .5, -1]
    assert ds.manifest.Hernia.fillna(-1).tolist()==[1, 0, -1]
    assert ds.problems[['line', 'column', 'value']].values.tolist()==[[4, 'age', '414Y']]


def test_nih_in_the_tree(files, nih):
    tree,m = chest_tree(),nih.manifest
    t = chestxray14(files/'nih/Data_Entry_2017_v2020.csv.gz', tree=chest_tree()).manifest
    lung = ['Atelectasis', 'Infiltration', 'Nodule', 'Pneumonia', 'Consolidation', 'Edema', 'Fibrosis',
        'Emphysema']
    assert ((t.Lung==1).to_numpy()==(m[lung]==1).any(axis=1).to_numpy()).all()
    assert ((t.Infiltrates==1).to_numpy()==((m.Infiltration==1) | (m.Consolidation==1)).to_numpy()).all()
    assert (t.Normal==1).sum()==60361 and t.Catheter.isna().all() and not (t.MH==0).any()
    assert tree.contradictions(t)==[]


# RSNA

def test_rsna_counts_are_the_published_ones(rsna):
    m = rsna.manifest
    assert (len(m), len(rsna.boxes), m.patient_id.nunique())==(26684, 9555, 11439)
    assert m['class'].value_counts().to_dict()=={'No Lung Opacity / Not Normal': 11821, 'Normal': 8851,
        'Lung Opacity': 6012}
    assert m[list(RSNA)].sum().to_dict()=={'Lung Opacity': 6012, 'Normal': 8851,
        'No Lung Opacity / Not Normal': 11821}
    assert m.age.isna().sum()==5 and rsna.problems.column.eq('age').all() # ages of 148 to 155 years


def test_rsna_rows_by_hand(rsna):
    image = '00436515-870c-4b36-a041-de91049b9ab4' # 264,152,213,379 and 562,152,256,453
    r = row(rsna, image)
    assert rsna.boxes.loc[rsna.boxes.image_id==image, XYXY].values.tolist()==[[264, 152, 477, 531],
        [562, 152, 818, 605]]
    assert (r.nih_image_id, r.patient_id, r.age, r.sex, r['view'], r['class'],
        r['Lung Opacity'])==('00020673_042.png', '20673', 32, 'F', 'AP', 'Lung Opacity', 1)
    r = row(rsna, '00313ee0-9eaa-42f4-b0ab-c148ed3241cd')
    assert [r[c] for c in RSNA]==[0, 0, 1]


def test_rsna_is_chestxray14(rsna, nih):
    both = rsna.manifest.merge(nih.manifest, left_on='nih_image_id', right_on='image_id',
        suffixes=('', '_nih'))
    assert len(both)==26684
    for c in ('sex', 'view', 'patient_id'): assert (both[c]==both[f'{c}_nih']).all()
    assert (both.split_nih=='test').any() # to train on RSNA and test on ChestX-ray14's official list leaks


# Format samples

def test_padchest_by_hand(files):
    with pytest.warns(UserWarning, match='contradicts itself'):
        ds = padchest(files/'format_samples/padchest.csv')
    m,tree = ds.manifest,chest_tree()
    assert (m['view'].tolist(), m.age.fillna(-1).tolist())==(['PA', 'LAT', 'AP', 'PA', 'PA', 'PA'],
        [84, 85, -1, 18, 7, 67])
    assert m.path.tolist()[1]=='5/900002_bbbbbb.png' and m.pediatric.tolist()==[0, 0, 0, 0, 1, 0]
    assert positive(m.iloc[0], tree.names)=={'Lung', 'PDTW', 'Infiltrates', 'Lung-urgent'}
    assert positive(m.iloc[1], tree.names)=={'Normal'} and (m.loc[1,
        list(tree.names)].drop('Normal')==0).all()
    assert m.loc[[2, 3, 5], list(tree.names)].isna().all().all() # unchanged; normal with pneumonia; no labels
    assert positive(m.iloc[4], tree.names)=={'Foreign bodies', 'Tube', 'NSG Tube', 'PDTW', 'PDTW-urgent',
        'Pleural effusion'}
    assert ds.problems[['line', 'column']].values.tolist()==[[5, 'terms']]


@pytest.mark.parametrize('terms, ones, zeros, unknown', [
    ("['suboptimal study']", {'Suboptimal'}, set(), {'Pneumonia', 'Normal', 'Tube'}),
    ("['suboptimal study', 'pneumonia']", {'Suboptimal', 'Pneumonia', 'Lung', 'Lung-urgent'}, {'Normal'},
    {'Mass', 'Hila'}),
    ("['suboptimal study', 'normal']", {'Suboptimal', 'Normal'}, {'Pneumonia', 'Lung', 'Tube'}, set()),
    ("['unchanged', 'cardiomegaly']", {'Cardiomegaly', 'MH', 'MH-urgent'},
    {'Normal', 'Pneumonia', 'Suboptimal'}, set()),
    ("['unchanged']", set(), set(), {'Normal', 'Pneumonia', 'Suboptimal'}),
    ("['exclude']", set(), set(), {'Normal', 'Pneumonia', 'Suboptimal'}),
    ("['pacemaker']", {'Foreign bodies', 'Electrical devices', 'Normal'}, {'Lung', 'Mass'}, set()),
    ("['strange sign', 'mass']", {'Mass'}, {'Normal'}, {'Lung', 'Tube'}),
    ("['strange sign']", set(), set(), {'Normal', 'Lung', 'Mass'}),
    ("['chilaiditi  SIGN']", {'PDTW'}, {'Normal', 'Lung'}, set())])
def test_padchest_rules(files, tmp_path, terms, ones, zeros, unknown):
    head = (files/'format_samples/padchest.csv').read_text().splitlines()[0]
    cells = dict.fromkeys(head.split(','), '') | {'ImageID': 'a.png', 'ImageDir': '0', 'PatientID': 'p',
        'StudyID': 's', 'Projection': 'PA', 'StudyDate_DICOM': '20150101', 'Labels': f'"{terms}"'}
    (tmp_path/'p.csv').write_text(head + '\n' + ','.join(cells.values()) + '\n')
    r = padchest(tmp_path/'p.csv').manifest.iloc[0]
    assert positive(r, chest_tree().names)==ones
    assert all(r[c]==0 for c in zeros) and all(np.isnan(r[c]) for c in unknown)


def test_chexpert_by_hand(files):
    f = files/'format_samples/chexpert_train.csv'
    m = chexpert(f).manifest
    assert m.patient_id.tolist()==['patient90001', 'patient90001', 'patient90002',
        'patient90003'] and m.study_id.tolist()[1]=='patient90001/study2'
    assert m['view'].tolist()==['AP', 'PA', 'LAT', ''] and m.split.eq('train').all()
    # age 0 of an unknown patient is no age
    assert m.age.fillna(-1).tolist()==[61, 62, 44, -1] and m.image_id.nunique()==4
    # -1 in the second line; the cells where it says nothing stay NaN
    uncertain = ['Enlarged Cardiomediastinum', 'Edema', 'Consolidation', 'Atelectasis', 'Pleural Effusion']
    second = {p: chexpert(f, p).manifest.loc[1] for p in ('ignore', 'ones', 'zeros', 'soft')}
    raw = pd.read_csv(f).iloc[1]
    uncertain = [c for c in CHEXPERT if raw[c]==-1]
    assert len(uncertain)==5 and second['ignore'][uncertain].isna().all() and (
        second['ones'][uncertain]==1).all() and (second['zeros'][uncertain]==0).all()
    assert second['soft'][uncertain].between(.55, .85).all() and second['soft'][uncertain].nunique()==5
    assert all(s['Lung Opacity']==1 and np.isnan(s['Lung Lesion']) for s in second.values())
    assert chexpert(f, unmentioned='zeros').manifest.loc[1, 'Lung Lesion']==0
    mixed = chexpert(f, {uncertain[0]: 'ones'}).manifest.loc[1, uncertain]
    assert mixed.iloc[0]==1 and mixed.iloc[1:].isna().all()
    real = chexpert(files/'other/chexpert_valid_sample.csv').manifest
    assert real.split.eq('valid').all() and positive(real.iloc[0], CHEXPERT)=={'Enlarged Cardiomediastinum',
        'Cardiomegaly', 'Lung Opacity'}


def test_ten_thousand_masks_come_back_from_a_siim_file(tmp_path):
    from radiology_ai.tasks.pneumothorax import save_siim
    gen = np.random.default_rng(0)
    masks = {}
    for i in range(10_000):
        y, x = np.mgrid[:1024:32, :1024:32] # blobs, specks, stripes, nothing, everything
        (v, u), (b, a) = gen.uniform(0, 1024, 2), gen.uniform(9, 400, 2)
        blob = ((y - v)/b)**2 + ((x - u)/a)**2<1
        masks[f'1.2.{i}'] = [blob, gen.random((32, 32))<gen.random()**3, np.arange(32)[None]%(1 + i%7)<1 | (y<0),
            np.zeros((32, 32), bool), np.ones((32, 32), bool)][i%5]
    table = pd.DataFrame({'image_id': list(masks), 'error': '', 'rle': [rle_encode(m) for m in masks.values()]})
    save_siim(table, tmp_path/'siim.csv')
    back = pd.read_csv(tmp_path/'siim.csv').set_index('ImageId').EncodedPixels
    assert len(back)==10_000
    for k, m in masks.items():
        assert np.array_equal(rle_decode(back[k], (32, 32)), m) and rle_area(back[k])==m.sum()


def test_siim_by_hand(files):
    ds = siim_pneumothorax(files/'format_samples/siim_train-rle.csv')
    assert ds.manifest.Pneumothorax.tolist()==[0, 1, 1] and len(ds.masks)==3
    # 200000 10 1014 12 1012 14 1010 15 1009 15: five columns from 195 on, all from row 320
    mask = image_mask(ds.masks, '1.2.276.0.9999.1.1.2')
    expected = np.zeros((1024, 1024), bool)
    for column,(top,length) in enumerate([(320, 10), (320, 12), (320, 14), (320, 15), (320, 15)], 195):
        expected[top:top+length, column] = True
    assert (mask==expected).all()
    assert image_mask(ds.masks, '1.2.276.0.9999.1.1.3').sum()==5+7+20+20 # two masks of one image
    index = pd.DataFrame({'SOPInstanceUID': ds.manifest.image_id, 'PatientID': ['A', 'A', 'B'],
        'StudyInstanceUID': ['1', '2', '3'], 'path': list('xyz'), 'view': 'PA', 'laterality': ''})
    known = siim_pneumothorax(files/'format_samples/siim_train-rle.csv', index=index).manifest
    assert (known.patient_id.tolist(), known.path.tolist(), known['view'].tolist())==(['A', 'A', 'B'],
        ['x', 'y', 'z'], ['PA']*3)


def test_vinbig_by_hand(files):
    ds = vinbig(files/'format_samples/vinbig_train.csv')
    m = ds.manifest
    assert m.n_readers.tolist()==[1, 2, 1] and m['No finding'].tolist()==[1, 0, 0]
    assert [positive(r, VINBIG) for _,r in m.iterrows()]==[set(), {'Cardiomegaly'}, {'Pneumothorax'}]
    assert ds.boxes[XYXY].values.tolist()==[[685.5, 1377.5, 1651.5, 1835.5], [100, 200, 400, 900]]
    assert ds.boxes.readers.tolist()==['R10|R9', 'R8'] and ds.boxes.votes.tolist()==[2, 1]
    assert vinbig(files/'format_samples/vinbig_train.csv', iou=None).boxes.reader.tolist()==['R10', 'R9',
        'R8']


def test_vinbig_votes(tmp_path):
    (tmp_path/'v.csv').write_text('image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n'
        + ''.join(f'i,{c},0,{r},{b}\n' for c,r,b in
        [('ILD', 'R1', '0,0,10,10'), ('ILD', 'R2', '0,0,10,12'), ('Calcification', 'R3', '5,5,9,9'),
        ('ILD', 'R3', '50,50,60,60')]))
    ds = vinbig(tmp_path/'v.csv')
    r = ds.manifest.iloc[0]
    assert r.ILD==1 and np.isnan(r.Calcification) and r.Pneumothorax==0 # three of three, one of three, none
    assert ds.boxes[ds.boxes.label=='ILD'].score.round(3).tolist()==[.667, .333]


def test_knees(real_data, tmp_path):
    ds = oai_knees(real_data/'knee_oai')
    assert len(ds.manifest)==880 and ds.manifest.split.value_counts().to_dict()=={'train': 750, 'valid': 130}
    r = ds.manifest.set_index('image_id').loc['images/train_0_9607954R.png']
    assert (r.kl, r.patient_id, r.laterality, r.split)==(0, '9607954', 'R', 'train')
    for p in ('train/0/9607954R.png', 'val/4/9000001L.png', 'auto_test/2/9000002_1.png'):
        (tmp_path/p).parent.mkdir(parents=True)
        (tmp_path/p).write_bytes(b'-')
    m = oai_knees(tmp_path).manifest.sort_values('kl')
    assert m[['split', 'kl', 'patient_id', 'laterality']].values.tolist()==[['train', 0, '9607954', 'R'],
        ['auto_test', 2, '9000002', ''], ['valid', 4, '9000001', 'L']]
    (tmp_path/'val/7').mkdir()
    (tmp_path/'val/7/9000003L.png').write_bytes(b'-')
    (tmp_path/'val/4/thumb.png').write_bytes(b'-')
    with pytest.raises(DataError,
            match=r"val/4/thumb.png.*split/\]grade/patient.*val/7/9000003L.png, column 'kl': 7.0 is not one of 0, 1, 2, 3, 4"):
        oai_knees(tmp_path)
    ds = oai_knees(tmp_path, errors='list')
    assert len(ds.manifest)==4 and ds.manifest.kl.isna().sum()==1 and len(ds.problems)==2


# Run lengths

def slow_decode(rle, h, w):
    "Pixel by pixel, down the columns."
    out,at = np.zeros((h, w), bool),0
    numbers = [int(v) for v in rle.split()] if rle!='-1' else []
    for gap,length in zip(numbers[::2], numbers[1::2]):
        at += gap
        for _ in range(length):
            out[at%h, at//h] = True
            at += 1
    return out


@pytest.mark.parametrize('seed', range(40))
def test_run_lengths_against_brute_force(seed):
    gen = np.random.default_rng(seed)
    h,w = gen.integers(1, 25, 2)
    mask = gen.random((h, w)) < gen.choice([0, .05, .5, .95, 1])
    rle = rle_encode(mask)
    assert (rle_decode(rle, (h, w))==mask).all() and (slow_decode(rle, h,
        w)==mask).all() and rle_area(rle)==mask.sum()
    # zero gaps and empty runs too
    odd = ' '.join(map(str, gen.integers(0, 3, 2*int(gen.integers(0, h*w//4+1)))))
    assert (rle_decode(odd, (h, w))==slow_decode(odd or '-1', h, w)).all()


def test_run_lengths_in_two_orders_differ():
    mask = np.zeros((3, 3), bool)
    mask[0] = True
    assert rle_encode(mask)=='0 1 2 1 2 1' and rle_encode(mask.T)=='0 3'


# Boxes

@pytest.mark.parametrize('seed', range(20))
def test_fused_boxes(seed):
    gen = np.random.default_rng(seed)
    n = 30
    corner,side = gen.uniform(0, 60, (n, 2)),gen.uniform(5, 40, (n, 2))
    b = pd.DataFrame(np.hstack([corner, corner+side]),
        columns=XYXY).assign(image_id=gen.choice(list('ab'), n), label=gen.choice(['m', 'n'], n),
        reader=gen.choice(['R1', 'R2', 'R3'], n))
    fused = fuse_boxes(b, .4, readers=3)
    shuffled = fuse_boxes(b.sample(frac=1, random_state=seed), .4, readers=3)
    key = ['image_id', 'label', *XYXY]
    pd.testing.assert_frame_equal(fused.sort_values(key).reset_index(drop=True),
        shuffled.sort_values(key).reset_index(drop=True))
    assert fused.votes.between(1, 3).all() and (fused.score==fused.votes/3).all()
    for (image,label),group in b.groupby(['image_id', 'label']):
        ours = fused[(fused.image_id==image) & (fused.label==label)]
        assert 1<=len(ours)<=len(group)
        for c in XYXY:
            assert group[c].min()<=ours[c].min() and ours[c].max()<=group[c].max()
    alone = fuse_boxes(b.assign(image_id=[f'i{k}' for k in range(n)]))
    assert len(alone)==n and np.allclose(alone.sort_values('x1')[XYXY], b.sort_values('x1')[XYXY])


def test_fused_box_is_the_weighted_mean():
    b = pd.DataFrame([('a', 'm', 0, 0, 10, 10, 'R1', 3.), ('a', 'm', 2, 0, 12, 10, 'R2', 1.),
        ('a', 'm', 40, 40, 50, 50, 'R2', 1.)], columns=['image_id', 'label', *XYXY, 'reader', 'weight'])
    assert fuse_boxes(b)[XYXY].values.tolist()==[[.5, 0, 10.5, 10], [40, 40, 50, 50]]
    assert box_iou([[0, 0, 2, 2]], [[1, 1, 3, 3], [0, 0, 2, 2],
        [5, 5, 6, 6]]).round(6).tolist()==[[round(1/7, 6), 1, 0]]


# Trees

def random_tree(gen):
    n = int(gen.integers(2, 9))
    parents = ['' if k==0 or gen.random()<.3 else f'c{gen.integers(0, k)}' for k in range(n)]
    return LabelTree(tuple(f'c{k}' for k in range(n)), tuple(parents), ('',)*n)


def slow_close(tree, values):
    "One rule at a time until nothing changes; None where two rules disagree."
    v,parent = dict(values),dict(zip(tree.names, tree.parents))
    changed = True
    while changed:
        changed = False
        for c,p in parent.items():
            if not p: continue
            if v[c]==1 and v[p]==0: return None
            if v[c]==1 and np.isnan(v[p]): v[p],changed = 1.,True
            if v[p]==0 and np.isnan(v[c]): v[c],changed = 0.,True
    return v


@pytest.mark.parametrize('seed', range(30))
def test_closing_a_tree_against_brute_force(seed):
    gen = np.random.default_rng(seed)
    tree = random_tree(gen)
    df = pd.DataFrame(gen.choice([0., 1., np.nan], (40, len(tree.names)), p=[.2, .2, .6]),
        columns=list(tree.names), index=range(100, 140))
    slow = [slow_close(tree, r) for r in df.to_dict('records')]
    wrong = {r for r,*_ in tree.contradictions(df)}
    assert wrong=={i for i,s in zip(df.index, slow) if s is None}
    closed = tree.close(df, errors='unknown')
    for i,s in zip(df.index, slow):
        np.testing.assert_array_equal(closed.loc[i, list(tree.names)].to_numpy(),
            [s[c] for c in tree.names] if s else np.full(len(tree.names), np.nan))
    known = df.notna().to_numpy() & ~df.index.isin(wrong)[:,None]
    assert (closed.to_numpy()[known]==df.to_numpy()[known]).all() # what was known stays
    pd.testing.assert_frame_equal(tree.close(closed), closed)


def test_contradictions_are_named():
    df = pd.DataFrame({'Pneumonia': [0, 1], 'Lung': [1, 0], 'Normal': [0, 1]}, index=[7, 9])
    with pytest.raises(DataError,
            match="row 9, column 'Pneumonia': is 1, and 'Lung' above it is 0.*row 9, column 'Normal': is 1, "
            "and so is 'Pneumonia'|row 9, column 'Pneumonia': is 1, and 'Lung' above it is 0; row 9, column "
            "'Pneumonia': is 1, and so is 'Normal'"):
        chest_tree().close(df)
    assert chest_tree().close(df, errors='unknown').loc[9].isna().all()


def test_chest_tree_is_the_reference():
    tree = chest_tree()
    assert len(tree.names)==32 and {t: tree.tiers.count(t) for t in tree.order}=={'no pathology': 8,
        'pathologic': 12, 'urgent': 12}
    parent = dict(zip(tree.names, tree.parents))
    assert (parent['Pneumonia'], parent['Lung-urgent'], parent['Lung'], parent['NSG Tube'])==('Lung-urgent',
        'Lung', '', 'Tube')
    for name,n in (('padchest', 175), ('nih14', 14)):
        terms = chest_terms(name)
        assert len(terms)==n
        for term,cats in terms.items(): assert all(parent[c] in ('', *cats) for c in cats), term
    assert chest_terms('padchest')['hydropneumothorax']==('PDTW-urgent', 'PDTW', 'Pleural effusion',
        'Pneumothorax')


def test_uncertain_policies_touch_only_the_uncertain():
    gen = np.random.default_rng(0)
    df = pd.DataFrame(gen.choice([-1., 0., 1., np.nan], (500, 4)), columns=list('abcd'))
    unsure = (df==-1).to_numpy()
    for policy in ('ignore', 'ones', 'zeros', 'soft'):
        out = resolve_uncertain(df, policy, seed=3)
        np.testing.assert_array_equal(out.to_numpy()[~unsure], df.to_numpy()[~unsure])
        assert not (out==-1).any().any()
    soft = resolve_uncertain(df, 'soft', (.2, .4), seed=3)
    assert ((soft.to_numpy()[unsure]>=.2) & (soft.to_numpy()[unsure]<=.4)).all()
    pd.testing.assert_frame_equal(soft, resolve_uncertain(df, 'soft', (.2, .4), seed=3))
    assert not soft.equals(resolve_uncertain(df, 'soft', (.2, .4), seed=4))
    assert (resolve_uncertain(df, 'soft', .7).to_numpy()[unsure]==.7).all()


# Bad input: each is named in the error, and collected with errors='list'

NIH_ROWS = ['a.png,Mass,0,1,50,M,PA,1,1,1,1', 'b.png,No Finding,0,2,50,M,PA,1,1,1,1',
    'c.png,Hernia|Efusion,0,3,50,M,PA,1,1,1,1', 'a.png,Mass,1,1,51,M,PA,1,1,1,1',
            'd.png,No Finding|Mass,0,4,abc,M,PA,1,1,1,1', 'e.png,Mass,0,,50,M,PA,1,1,1,1']


def bad_nih(folder):
    (folder/'entry.csv').write_text('\n'.join([NIH_HEADER, *NIH_ROWS]) + '\n')
    (folder/'box.csv').write_text('Image Index,Finding Label,Bbox '
        '[x,y,w,h]\na.png,Mass,10,10,20,20\na.png,Mass,1000,10,200,20\nb.png,Infiltrate,5,5,0,9\n'
        'z.png,Mass,1,1,2,2\nb.png,Masse,1,1,2,2\nb.png,Mass,1,x,2,2\n')
    (folder/'images').mkdir()
    for name in 'acde': (folder/'images'/f'{name}.png').touch()
    return folder


def test_every_fault_of_a_label_file_is_named(tmp_path):
    folder = bad_nih(tmp_path)
    ds = chestxray14(folder/'entry.csv', folder/'box.csv', images=folder/'images', errors='list')
    found = {(r.file, r.line, r.column) for r in ds.problems.itertuples()}
    assert found=={('entry.csv', 4, 'findings'), ('entry.csv', 5, 'image_id'), ('entry.csv', 6, 'findings'),
        ('entry.csv', 6, 'age'), ('entry.csv', 7, 'patient_id'), ('entry.csv', 3, 'path'),
                   ('box.csv', 3, 'x2'), ('box.csv', 4, 'x2'), ('box.csv', 5, 'image_id'),
                   ('box.csv', 6, 'label'), ('box.csv', 7, 'y'), ('box.csv', 7, 'y1'), ('box.csv', 7, 'y2')}
    assert "did you mean 'Effusion'?" in ds.problems.problem.str.cat()
    assert ds.manifest.image_id.tolist()==['a.png', 'c.png',
        'd.png'] and ds.boxes[XYXY].values.tolist()==[[10, 10, 30, 30]]
    # after 'Efusion' what is not named is unknown
    assert ds.manifest.Hernia.fillna(-1).tolist()==[0, 1, -1] and ds.manifest.Mass.fillna(-1).tolist()==[1,
        -1, -1]
    assert manifest_problems(ds.manifest, list(NIH14))==[]
    with pytest.raises(DataError,
            match=r"entry.csv has 13 faults: .*entry.csv, line 6 \(image d.png\), column 'age': 'abc' is no age.*and 8 more"):
        chestxray14(folder/'entry.csv', folder/'box.csv', images=folder/'images')


def test_missing_files_columns_and_options(tmp_path):
    (tmp_path/'e.csv').write_text(f'{NIH_HEADER}\n{NIH_ROWS[0]}\n')
    (tmp_path/'short.csv').write_text('Image Index,Finding Label\na.png,Mass\n')
    (tmp_path/'list.txt').write_text('z.png\n')
    for call,words in ((lambda: chestxray14(tmp_path/'none.csv'), 'There is no file'),
            (lambda: chestxray14(tmp_path/'short.csv'),
            "there is no column 'Finding Labels'; did you mean 'Finding Label'"),
                       (lambda: chestxray14(tmp_path/'e.csv', tmp_path/'none.csv'), 'There is no file'),
                       (lambda: chestxray14(tmp_path/'e.csv', train_val=tmp_path/'none.txt'),
                       'There is no file'),
                       (lambda: chestxray14(tmp_path/'e.csv', train_val=tmp_path/'list.txt'),
                       'names none of the 1 images'), (lambda: chestxray14(tmp_path/'e.csv', errors='skip'),
                       "errors is 'skip'"),
                       (lambda: chestxray14(tmp_path/'e.csv', images=tmp_path/'nowhere'),
                       'There is no folder'), (lambda: from_folders(tmp_path/'nowhere'),
                       'There is no folder'),
                       (lambda: chest_terms('mimic'), "no mapping 'mimic'"),
                       (lambda: chexpert(tmp_path/'e.csv', unmentioned='ones'), "unmentioned is 'ones'")):
        with pytest.raises(DataError, match=words): call()
    (tmp_path/'head.csv').write_text(NIH_HEADER + '\n')
    with pytest.raises(DataError, match='the table has no rows'): chestxray14(tmp_path/'head.csv')


@pytest.mark.parametrize('errors', ['raise', 'list'])
def test_mixed_encodings(tmp_path, errors):
    (tmp_path/'m.csv').write_bytes('file,case,doctor\na.png,1,Muñoz\n'.encode()
        + 'b.png,2,Peña\n'.encode('latin-1') + 'c.png,3,Ruiz\n'.encode())
    def call():
        return from_csv(tmp_path/'m.csv', {'image_id': 'file', 'patient_id': 'case'}, keep=['doctor'],
            errors=errors)
    if errors=='raise':
        with pytest.raises(DataError, match="m.csv, line 3, column 'doctor': 'Peña' is not UTF-8"): call()
    else:
        ds = call()
        assert ds.manifest.doctor.tolist()==['Muñoz', 'Peña',
            'Ruiz'] and ds.problems[['line', 'column']].values.tolist()==[[3, 'doctor']]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'cp1252'])
@pytest.mark.parametrize('zipped', [False, True])
def test_one_encoding_is_no_fault(tmp_path, encoding, zipped):
    data = 'file;case;fractura\nañil.png;1;yes\nb.png;2;\n'.encode(encoding)
    (tmp_path/'o.csv').write_bytes(gzip.compress(data) if zipped else data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        ds = from_csv(tmp_path/'o.csv', {'image_id': 'file', 'patient_id': 'case'}, 'fractura')
    assert ds.manifest.image_id.tolist()==['añil.png', 'b.png'] and len(ds.problems)==0
    assert [('Windows-1252' in str(w.message)) for w in caught]==([True] if encoding=='cp1252' else [])


@pytest.mark.parametrize('errors', ['raise', 'list'])
def test_masks_of_another_size(tmp_path, errors):
    for name,size in (('a', (8, 6)), ('b', (8, 6)), ('a_mask', (8, 6)), ('b_mask', (6, 8))):
        Image.new('L', size).save(tmp_path/f'{name}.png')
    (tmp_path/'c.png').write_bytes(b'no image')
    (tmp_path/'m.csv').write_text(
        'file,case,mask\na.png,1,a_mask.png\nb.png,1,b_mask.png\nb.png,1,gone.png\nc.png,2,c.png\n')
    (tmp_path/'r.csv').write_text('file,case,rle,H,W\na.png,1,0 48,6,8\nb.png,1,40 9,6,8\nb.png,1,1 2 3,6,8\na.png,1,-1,6,8\n')
    def files():
        return from_csv(tmp_path/'m.csv', dict(path='file', patient_id='case', mask='mask'), images=tmp_path,
            errors=errors)
    def runs():
        return from_csv(tmp_path/'r.csv', dict(image_id='file', patient_id='case', rle='rle', height='H',
            width='W'), errors=errors)
    if errors=='raise':
        with pytest.raises(DataError,
                match=r"line 3 \(image b.png\), column 'mask': the mask has 6 x 8 pixels, its image 8 x 6.*"
                r"line 4 .*there is no file gone.png.*line 5 .*cannot be read"):
            files()
        with pytest.raises(DataError,
                match=r"line 3 \(image b.png\), column 'rle': the mask ends at pixel 49, the image of 6 x 8 has 48.*"
                r"line 4 .*are not pairs"):
            runs()
    else:
        assert files().masks.image_id.tolist()==['a.png'] and files().problems.line.tolist()==[3, 4, 5]
        assert runs().masks.image_id.tolist()==['a.png'] and len(runs().manifest)==2


def test_faults_of_the_other_adapters(tmp_path, files):
    def cut(name, old, new):
        (tmp_path/name).write_text((files/'format_samples'/name).read_text().replace(old, new))
        return tmp_path/name
    def listed(adapter, path, **kwargs):
        return [(r.line, r.column) for r in adapter(path, errors='list', **kwargs).problems.itertuples()]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        assert listed(padchest, cut('padchest.csv', "['unchanged']\"", 'unchanged"'))==[(4, 'terms'),
            (5, 'terms')]
        assert listed(padchest, cut('padchest.csv', 'AP_horizontal', 'APP'))[0]==(4, 'projection')
    assert listed(chexpert, cut('chexpert_train.csv', ',,,,1.0,,,,1.0,,,0.0', ',,,,2.0,,,,1.0,,,0.0'))==[(4,
        'Lung Opacity')]
    assert listed(chexpert, cut('chexpert_train.csv', 'patient90002/', ''))[:1]==[(4, 'path')]
    assert listed(siim_pneumothorax, cut('siim_train-rle.csv', '1.1.1,-1', '1.1.2,-1'))==[(2, 'rle')]
    assert listed(siim_pneumothorax, cut('siim_train-rle.csv', '400500 5 1019 7', '1048570 7'))==[(4, 'rle')]
    assert listed(vinbig, cut('vinbig_train.csv', '1653.0', '16a'))[0]==(3, 'x2')
    assert listed(vinbig, cut('vinbig_train.csv', 'Pneumothorax', 'Pneumotorax'))==[(5, 'label')]
    sizes = pd.DataFrame({'image_id': ['0'*31 + k for k in '123'], 'height': [2000, 2000, 800],
        'width': 2000})
    assert listed(vinbig, files/'format_samples/vinbig_train.csv', sizes=sizes)==[(5, 'y2')]


def test_rsna_faults(tmp_path):
    (tmp_path/'l.csv').write_text(
        'patientId,x,y,width,height,Target\na,1,1,9,9,1\na,1000,1,90,9,1\nb,,,,,0\nc,5,5,5,5,0\nd,1,1,2,2,1\nd,,,,,0\ne,,,,,1\n')
    (tmp_path/'c.csv').write_text('patientId,class\na,Lung Opacity\nb,Lung Opacity\nc,Norml\nd,Lung Opacity\n')
    ds = rsna_pneumonia(tmp_path/'l.csv', tmp_path/'c.csv', errors='list')
    found = {(r.file, r.line, r.column) for r in ds.problems.itertuples()}
    assert {('l.csv', 3, 'x2'), ('l.csv', 5, 'target'), ('l.csv', 6, 'target'), ('l.csv', 7, 'target'),
        ('l.csv', 8, 'x1'), ('c.csv', 4, 'class'), ('l.csv', 4, 'class')}<=found
    assert ds.boxes.image_id.tolist()==['a', 'd']


# A user's own files

def test_images_are_found_by_the_end_of_their_path(tmp_path):
    for p in ('set/p1/view.png', 'set/p2/view.png', 'set/p3/film.jpg', 'other/p1/x.png'):
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/p).touch()
    names = pd.Series(['old/p1/view.png', 'old/p2/view.png', 'old/p4/view.png', 'p9/film.png', 'x.png',
        'gone.png'])
    got = find_images(tmp_path, names)
    assert [g if g!=g else g.replace(f'{tmp_path}/', '') for g in got][:2]==['set/p1/view.png',
        'set/p2/view.png']
    assert got.isna().tolist()==[False, False, True, False, False, True] # p4's view.png is nobody else's


def test_own_csv(tmp_path):
    (tmp_path/'o.csv').write_text(
        'id,pat,x,y,b,h,what,reader,fx\na,1,0,0,5,5,mass,R1,1\na,1,1,1,5,5,mass,R2,0\nb,1,,,,,,R1,no\nc,,,,,,,R1,maybe\n')
    columns = dict(image_id='id', patient_id='pat', x1='x', y1='y', w='b', h='h', label='what',
        reader='reader')
    with pytest.raises(DataError,
            match=r"line 5 \(image c\), column 'patient_id': is missing; .*line 5 \(image c\), column 'fx': 'maybe' is not 1, 0 or empty"):
        from_csv(tmp_path/'o.csv', columns, 'fx')
    ds = from_csv(tmp_path/'o.csv', columns, 'fx', errors='list')
    assert ds.manifest.image_id.tolist()==['a', 'b'] and ds.manifest.fx.tolist()==[1,
        0] and ds.boxes.reader.tolist()==['R1', 'R2']
    assert fuse_boxes(ds.boxes)[XYXY].values.tolist()==[[.5, .5, 5.5, 5.5]]
    with pytest.warns(UserWarning, match='splits can leak'):
        assert from_csv(tmp_path/'o.csv', columns, no_patient='image').manifest.patient_id.tolist()==['1',
            '1', 'c']
    with pytest.warns(UserWarning, match='left out'):
        assert len(from_csv(tmp_path/'o.csv', columns, no_patient='drop').manifest)==2
    for wrong,words in ((dict(columns, fx='fx'), "columns holds 'fx'"),
            ({'patient_id': 'pat'}, 'neither image_id nor path'), (dict(columns, image_id='ID_'), None),
            (dict(image_id='id', rle='x'), 'without height and width'),
                        (dict(image_id='id', mask='x'), 'images is not given'),
                        (dict(image_id='id', x1='x'), 'but not x2|but not y1')):
        if words:
            with pytest.raises(DataError, match=words): from_csv(tmp_path/'o.csv', wrong, no_patient='image')
    with pytest.raises(DataError,
            match=r"line 3 \(image a\), column 'image_id': this image was there before"):
        from_csv(tmp_path/'o.csv', dict(image_id='id', patient_id='pat'), no_patient='image')


def test_blank_lines_are_counted(tmp_path):
    (tmp_path/'b.csv').write_text('id,pat,fx\n\na,1,1\n\nb,2,often\n,,\n\n\n')
    where = dict(image_id='id', patient_id='pat')
    ds = from_csv(tmp_path/'b.csv', where, 'fx', errors='list')
    assert {(r.line, r.column) for r in ds.problems.itertuples()}=={(5, 'fx'), (6, 'image_id'),
        (6, 'patient_id')} and ds.manifest.fx.fillna(-1).tolist()==[1, -1]
    with pytest.raises(DataError, match="line 5: 'often'"): read_labels(tmp_path/'b.csv', 'fx')
    (tmp_path/'c.csv').write_text('id,fx\n\na,1\n\n')
    assert read_labels(tmp_path/'c.csv', 'fx').index.tolist()==[0]


def test_own_findings(tmp_path):
    (tmp_path/'f.csv').write_text('id,pat,words\na,1,Mass; Edema\nb,2,none\nc,3,\nd,4,Mas\n')
    where = dict(image_id='id', patient_id='pat')
    m = from_csv(tmp_path/'f.csv', where, findings='words', sep=';', nothing=['none'],
        vocab=['Mass', 'Edema'], errors='list')
    assert m.manifest[['Mass', 'Edema']].fillna(-1).values.tolist()==[[1, 1], [0, 0], [-1, -1], [-1, -1]]
    assert m.problems[['line', 'column', 'value']].values.tolist()==[[5, 'words', 'Mas']]
    assert 'Mas' in from_csv(tmp_path/'f.csv', where, findings='words', sep=';', nothing=['none']).manifest


def test_real_masks_fit_their_images(real_data):
    folder = real_data/'chest_child'
    ds = from_csv(folder/'manifest.csv', dict(path='path', patient_id='patient_group', split='split',
        mask='lung_mask'), findings='labels', images=folder)
    raw = pd.read_csv(folder/'manifest.csv')
    assert (len(ds.manifest), len(ds.masks))==(len(raw),
        raw.lung_mask.notna().sum()) and set(zip(ds.masks.height, ds.masks.width))=={(224, 224)}
    assert ds.manifest.normal.sum()==(raw['labels']=='normal').sum()


def test_link_renames_boxes_too(files):
    ds = vinbig(files/'format_samples/vinbig_train.csv')
    index = pd.DataFrame({'path': [f'/store/{i}.dicom' for i in ds.manifest.image_id[1:]],
        'SOPInstanceUID': ['1.2', '1.3'], 'PatientID': ['P', 'P'], 'StudyInstanceUID': ['s', 't']})
    with pytest.warns(UserWarning, match='Joined on path'): linked = link(ds, index)
    assert linked.manifest.patient_id.tolist()==['P', 'P'] # the label file knows no patients, the headers do
    assert linked.manifest.image_id.tolist()==['1.2', '1.3'] and linked.boxes.image_id.tolist()==['1.2',
        '1.3']
    assert linked.manifest.source_id.tolist()==ds.manifest.image_id[1:].tolist()
