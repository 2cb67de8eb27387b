"""Two knees on a film are two rows, doubtful knees are kept and flagged, a reader overrides the localiser, and the report tells
which labels were left out: from the file to the report."""
import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from radiology_ai.core import DataError, Radiograph, StoreError, rng, transform_points
from radiology_ai.data.labels import make_manifest
from radiology_ai.data.regions import XYXY, rle_decode, rle_encode
from radiology_ai.data.sides import ACROSS, NEITHER
from radiology_ai.data.split import official_split
from radiology_ai.data.targets import stored_boxes, stored_points, write_masks
from radiology_ai.explain import heat_to_stored
from radiology_ai.phantom.injured import injured_knee
from radiology_ai.phantom.knee import simulate_knee
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess import recipe as room
from radiology_ai.preprocess.joined import JoinedStore
from radiology_ai.preprocess.knee import DOUBTFUL, Knee, locate_knees
from radiology_ai.preprocess.places import film_id
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.serve.predict import explain, predict
from radiology_ai.tasks.boxes import to_film
from radiology_ai.tasks.knee import KNEE
from radiology_ai.tasks.masks import on_film
from radiology_ai.tasks.registry import evaluate, report, train

UID = '1.2.826.0.1.3680043.8.498.77.'


def dicom(path, p, k, side):
    "The film of a phantom as a DICOM file."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f'{UID}{k}'
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f'{UID}1{k}.1', f'{UID}1{k}.2'
    ds.PatientID = f'P{k}'
    ds.PatientName = f'Patient {k}'
    ds.PatientSex = 'F'
    ds.PatientBirthDate = '19600101'
    ds.StudyDate, ds.Modality, ds.BodyPartExamined, ds.ViewPosition = '20240101', 'DX', 'KNEE', 'AP'
    if side: ds.ImageLaterality = side
    a = np.rint(expose(p, rng(k)).pixels*4095).astype(np.uint16)
    ds.Rows, ds.Columns = a.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
    ds.PixelSpacing, ds.PixelData = [p.spacing]*2, a.tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "A folder of films, every second one with two knees, and the truth: a row a knee."
    folder, rows = tmp_path_factory.mktemp('knees'), []
    (folder/'xrays').mkdir()
    for k in range(20):
        two, side, header = k%2==0, 'RL'[k//2%2], ('', 'L', 'R', 'B')[k//2%4] if k%2==0 else ''
        p = simulate_knee(k+300, grade=5*(k%3>0), side=side, size=224, bilateral=two)
        dicom(folder/'xrays'/f'{k:02d}.dcm', p, k, header)
        rows.append(dict(image_id=f'{UID}{k}', file=f'{k:02d}.dcm', side=side,
            fractured=p.labels['fractured'], two=two,
            joint=p.points['joint'], header=header))
        if two: rows.append(rows[-1] | dict(side='LR'[side=='L'], fractured=0, joint=p.points['joint_other']))
    return folder, pd.DataFrame(rows)


@pytest.fixture(scope='module')
def store(films):
    return preprocess_folder(films[0]/'xrays', films[0]/'store', recipe('knee', size=64), workers=1,
        show=False)


def test_each_knee_has_its_crop_side_and_affine(films, store):
    folder, truth = films
    assert len(store)==len(truth)==30 and store.index.path.nunique()==20 and not len(store.verify())
    for t in truth.itertuples():
        i = store.position(f"{t.image_id}:{dict(L='left', R='right')[t.side]}" if t.two else t.image_id)
        row, r = store.index.iloc[i], store.radiograph(i)
        assert (row.side, row.flipped)==(t.side,
            t.side=='L') and row.patient_id==f"P{t.file.split('.')[0].lstrip('0') or 0}"
        assert row.laterality==(t.side if t.two else '') and row.header_side==(t.header if t.header in 'LR'
            else '')
        # the joint is in the middle of its crop
        assert np.abs(transform_points(r.affine, [t.joint]) - 32).max()<3
    assert not store.index.doubtful.any() and (store.index.reason=='').all()


def test_a_film_with_one_knee_is_as_it_was(films, store):
    r = recipe('knee', size=64)
    from radiology_ai.dicom.read import read_radiograph
    film = read_radiograph(films[0]/'xrays'/'01.dcm')
    seen, i = r(film), store.position(f'{UID}1')
    assert 'of_two' not in seen.tags and np.array_equal(np.rint(seen.pixels*np.float32(255)).astype(np.uint8),
        store[i])


def labels_of(truth, *, side=True):
    t = truth if side else truth[~truth.image_id.duplicated()]
    return t[['image_id', 'fractured', *(['side']*side)]].replace({'side': dict(L='left', R='Right')})


def test_labels_join_by_side(films, store):
    m = make_manifest(store.index, labels_of(films[1]))
    want = {(t.image_id, t.side): t.fractured for t in films[1].itertuples()}
    got = {(i.rsplit(':', 1)[0], s): f for i, s, f in zip(m.image_id, m.side, m.fractured)}
    assert got==want and len(m)==30 and 'header_side' not in m and set(
        m.laterality[m.image_id.str.contains(':')])=={'L', 'R'}
    again = make_manifest(store.index, m[['image_id', 'fractured']]) # labels of knees, by their own names
    assert again.fractured.tolist()==m.fractured.tolist()
    by_path = make_manifest(store.index,
        labels_of(films[1]).assign(file=films[1].file).drop(columns='image_id'))
    assert by_path.fractured.tolist()==m.fractured.tolist()


def test_a_label_without_side_is_never_doubled(films, store):
    with pytest.warns(UserWarning,
            match='10 films with two knees have a label that does not say the side') as told:
        m = make_manifest(store.index, labels_of(films[1], side=False))
    assert any("on the header's side in 5, to no knee in 5. Add a column side" in str(w.message)
        for w in told)
    two = m[m.image_id.str.contains(':')]
    assert two.groupby('path').fractured.count().isin([0, 1]).all()
    got = two[two.fractured.notna()]
    header = films[1].set_index('image_id').header
    assert len(got)==5 and all(header[i.rsplit(':', 1)[0]].iloc[0]==s for i, s in zip(got.image_id, got.side))
    both = make_manifest(store.index, labels_of(films[1], side=False).assign(laterality='both'))
    assert both.fractured.notna().all() and set(both.laterality[two.index])=={'L', 'R'}


def test_one_knee_of_which_the_table_tells_both_sides(films, store):
    one = store.index[store.index.side.eq('L') & ~store.index.image_id.str.contains(':')].iloc[:2]
    t = pd.DataFrame([dict(image_id=i, side=s, grade=g) for i in one.image_id
        for s, g in (('L', 3), ('R', 0))])
    assert make_manifest(one, t).grade.tolist()==[3, 3]


# ---- what was drawn on films with two knees ----------------------------------------------------------------------------

def drawn(truth, half=9.):
    "A box around each joint of the films with two knees, by the name of the film, and its mask's corners."
    t = truth[truth.two].reset_index(drop=True)
    at = np.array(t.joint.tolist())
    box = {c: at[:, k%2]+(half if k>1 else -half) for k, c in enumerate(XYXY)}
    return t[['image_id', 'side']].assign(label='joint', x=at[:, 0], y=at[:, 1], **box)


def sided(t): return t.image_id+':'+t.side.map(dict(L='left', R='right'))


def test_boxes_and_points_of_a_film_go_to_their_knee(films, store):
    t = drawn(films[1])
    by_film, by_knee = t.drop(columns='side'), t.assign(image_id=sided(t)).drop(columns='side')
    for f, columns in ((stored_boxes, XYXY), (stored_points, ['x', 'y'])):
        got, want = (f(store, o, drawn_on='film').sort_values(['image_id', *columns], ignore_index=True)
            for o in (by_film, by_knee))
        pd.testing.assert_frame_equal(got, want)
        assert len(got)==20 and np.abs(got[['x', 'y'] if f is stored_points else XYXY].to_numpy()-32).max()<12
    # drawn on the film at half its size, with a size a film
    sizes = t[['image_id']].drop_duplicates().merge(pd.DataFrame({'image_id': store.index.image_id.map(film_id),
        'width': store.index.Columns/2, 'height': store.index.Rows/2}).drop_duplicates('image_id'))
    half = by_film.assign(**{c: by_film[c]/2 for c in [*XYXY, 'x', 'y']})
    pd.testing.assert_frame_equal(stored_boxes(store, half, drawn_on=sizes)[XYXY],
        stored_boxes(store, by_film, drawn_on='film')[XYXY])
    one = by_film.iloc[:1]
    knees = stored_boxes(store, one, drawn_on='film').set_index('image_id').x1
    assert knees[sided(t)[0]]>0 and np.isnan(knees.drop(sided(t)[0])).tolist()==[True] # the other was looked at
    told = stored_boxes(store, one.assign(side=t.side[0]), drawn_on='film')
    assert told.image_id.tolist()==[sided(t)[0]]
    seen = stored_boxes(store, by_film[2:], drawn_on='film', undrawn=[one.image_id[0]])
    assert set(seen.image_id[seen.x1.isna()])=={f'{one.image_id[0]}:{s}' for s in ('left', 'right')}


def test_what_lies_across_both_knees_or_in_neither_is_named(films, store):
    t = drawn(films[1]).drop(columns='side')
    first = t[t.image_id==t.image_id[0]]
    across = first.iloc[:1].assign(x1=first.x1.min(), x2=first.x2.max())
    corner = first.iloc[1:2].assign(x1=1., y1=1., x2=9., y2=9., x=3., y=3., label='corner')
    table = pd.concat([t, across.assign(image_id=t.image_id[4]), corner], ignore_index=True)
    boxes, lost = stored_boxes(store, table, drawn_on='film', errors='list')
    assert lost[['row', 'image_id', 'problem']].to_numpy().tolist()==[[20, t.image_id[4], ACROSS],
        [21, t.image_id[0], NEITHER]]
    assert boxes.x1.notna().sum()==20
    with pytest.raises(DataError, match=r'row 20 .*lies across both knees.*add a column side'):
        stored_boxes(store, table, drawn_on='film')
    with pytest.warns(UserWarning, match=r'1 of the boxes lie in neither of the two knees .*\(row 21\)'):
        stored_boxes(store, table.drop(20), drawn_on='film')
    points, lost = stored_points(store, table.drop(20), drawn_on='film', errors='list')
    assert len(points)==20 and lost.problem.tolist()==[NEITHER]
    alone, lost = stored_boxes(store, pd.concat([across, t[2:]]), drawn_on='film', errors='list')
    assert t.image_id[0] not in set(alone.image_id.map(film_id)) # nothing is known of its knees


def test_masks_of_a_film_go_to_their_knee(films, store, tmp_path):
    t = drawn(films[1])
    sizes = store.index.assign(film=store.index.image_id.map(film_id)).drop_duplicates('film').set_index('film')
    def mask(rows):
        m = np.zeros(tuple(sizes.loc[rows.image_id.iloc[0], ['Rows', 'Columns']].astype(int)), bool)
        for r in rows.itertuples(): m[round(r.y1):round(r.y2), round(r.x1):round(r.x2)] = True
        return m
    own = {i: mask(t.iloc[[k]]) for k, i in enumerate(sided(t))}
    rle = pd.DataFrame([dict(image_id=film_id(i), label='joint', rle=rle_encode(m), height=m.shape[0], width=m.shape[1])
        for i, m in own.items()])
    want = write_masks(store, own, tmp_path/'own', show=False)
    for k, m in enumerate((rle, {i: mask(g) for i, g in t.groupby('image_id')})):
        got = write_masks(store, m, tmp_path/str(k), show=False, errors='list')
        assert (got.known==want.known).all() and want.known.sum()==20 and not len(got.problems)
        assert all(np.array_equal(got[i], want[i]) for i in range(len(store)))
    first = t.image_id[0]
    side = write_masks(store, rle[:1].assign(side=t.side[0]), tmp_path/'side', show=False)
    assert store.index.image_id[side.known].tolist()==[sided(t)[0]]
    knees = store.index.image_id.map(film_id)==first
    half = write_masks(store, rle[:1], tmp_path/'half', show=False)
    assert half.known[knees].all() and [half[i].any() for i in np.flatnonzero(knees)].count(True)==1
    wide = t[:2].assign(x1=t.x1[:2].min(), x2=t.x2[:2].max(), y1=t.y1[:2].min(), y2=t.y2[:2].max())
    odd = {first: mask(wide), t.image_id[2]: mask(t[2:4]) | mask(t[2:3].assign(x1=1, y1=1, x2=9, y2=9))}
    got = write_masks(store, odd, tmp_path/'odd', show=False, errors='list')
    assert got.problems.problem[got.problems.image_id==t.image_id[2]].tolist()==[NEITHER]
    told = got.problems[got.problems.image_id.map(film_id)==first].problem
    assert len(told)==2 and told.str.contains(ACROSS).all() and not got.known[knees].any() and got.known.sum()==2
    with pytest.raises(DataError, match='across both knees'):
        write_masks(store, odd, tmp_path/'odd', show=False)
    with pytest.warns(UserWarning, match='1 of the masks lie in neither'):
        write_masks(store, {t.image_id[2]: odd[t.image_id[2]]}, tmp_path/'odd', show=False)


def test_knees_of_a_film_stay_together(films, store):
    index = store.index.assign(patient_id='')
    m = make_manifest(index, labels_of(films[1]), no_patient='image')
    assert (m.groupby('path').patient_id.nunique()==1).all()
    names = list(dict.fromkeys(films[1].image_id))
    split = official_split(m, dict(train=names[:12], valid=names[12:16], test=names[16:]))
    assert (split.groupby('path').split.nunique()==1).all() and split.split.notna().all()


def test_stores_with_one_film_twice_are_refused(films, store, tmp_path):
    place = pd.DataFrame([dict(path='00.dcm', x=60, y=80)])
    other = preprocess_folder([films[0]/'xrays'/'00.dcm'], tmp_path/'s', store.recipe, workers=1, show=False,
        places=place)
    assert other.index.image_id.tolist()==[f'{UID}0']
    with pytest.raises(StoreError, match='in two of the stores'): JoinedStore(store, other)


def test_a_reader_overrides(films, tmp_path):
    files = [films[0]/'xrays'/f for f in ('00.dcm', '01.dcm', '03.dcm')]
    made = dict(recipe=recipe('knee', size=64), workers=1, show=False)
    before = preprocess_folder(files, tmp_path/'s', **made)
    at = films[1].set_index('file').joint
    places = pd.DataFrame([dict(image_id=f'{UID}1', x=30., y=40., side='left'),
        dict(path='xrays/03.dcm', x1=10, y1=20, x2=110,
        y2=120)])
    with pytest.raises(StoreError, match='2 changed.*update=True'):
        preprocess_folder(files, tmp_path/'s', places=places, **made)
    s = preprocess_folder(files, tmp_path/'s', places=places, update=True, **made)
    assert s.index.image_id.tolist()==before.index.image_id.tolist() and not len(s.verify())
    point, box = (s.radiograph(s.position(f'{UID}{k}')) for k in (1, 3))
    assert np.abs(transform_points(point.affine, [(30., 40.)]) - 32).max()<.1 and point.tags['side']=='L'
    corners = transform_points(np.linalg.inv(box.affine), [(0, 0), (64, 64)])
    assert np.abs(np.sort(corners, 0) - [(10, 20), (110, 120)]).max()<1
    assert s.index.reason.tolist()==['', '', *['the knee was placed by a reader']*2]
    # nothing to do
    assert preprocess_folder(files, tmp_path/'s', places=places, **made).fingerprint==s.fingerprint
    two = pd.DataFrame([dict(path='01.dcm', x=at['01.dcm'][0], y=at['01.dcm'][1]),
        dict(path='01.dcm', x=150, y=90)])
    s = preprocess_folder(files, tmp_path/'t', places=two, **made)
    assert s.index.image_id[2:4].tolist()==[f'{UID}1:right', f'{UID}1:left'] and len(s)==5
    with pytest.raises(DataError, match='shows no knee'):
        preprocess_folder(files, tmp_path/'u', 'plain', workers=1, show=False, places=places)


def test_a_doubtful_knee_is_kept_and_flagged(films, store, tmp_path, monkeypatch):
    film = Radiograph(np.zeros((200, 200), np.float32) + np.linspace(0, 1, 200, dtype=np.float32))
    def seen(r, mm=140., threshold=None, *, doubtful=None, called=False):
        return ([Knee('R', (100, 100), (50, 50, 150, 150), .3, mm, 'the knee is doubtful (score 0.30)')]
            if doubtful is not None else [])
    monkeypatch.setattr(room, 'locate_knees', seen)
    r = recipe('knee', size=64)(film)
    assert r.tags['knee_found'] and r.tags['doubtful'] and r.tags[
        'reason']=='the knee is doubtful (score 0.30)'
    s = preprocess_folder([films[0]/'xrays'/'01.dcm'], tmp_path/'s', store.recipe, workers=1, show=False)
    assert s.index.doubtful.tolist()==[True] and s.index.score.tolist()==[.3]
    assert KNEE.usable(s.index).tolist()==['']
    fig = s.contact_sheet()
    assert [t.get_text() for ax in fig.axes for t in ax.texts]==['0.30'] and not [t for ax in
        store.contact_sheet(2).axes for t in ax.texts]


def test_scores_between_the_limits_are_not_sure():
    p = simulate_knee(302, side='R', size=224)
    r = Radiograph(expose(p, rng(2)).pixels, (p.spacing,)*2)
    assert locate_knees(r, threshold=1.)==[] and not locate_knees(r)[0].doubt
    k, = locate_knees(r, threshold=1., doubtful=.1)
    assert k.doubt.startswith('the knee is doubtful (score')


@pytest.mark.parametrize('seed,kind,said', [(5_000_000, 'hand', 'another size'),
    (5_000_000, 'upside down', 'upside down')])
def test_injured_knees_that_are_not_sure_are_kept(seed, kind, said):
    p = injured_knee(seed, kind, 'R', 384)
    film = Radiograph(expose(p, rng(0, 'injured', kind)).pixels, (p.spacing,)*2)
    assert locate_knees(film)==[]
    assert locate_knees(film, doubtful=.999)==[]   # nobody calls it a knee
    k, = locate_knees(film, doubtful=DOUBTFUL, called=True)
    assert said in k.doubt and np.hypot(*np.subtract(k.center, p.points['joint']))*p.spacing<20
    assert np.allclose(((k.box[0]+k.box[2])/2, (k.box[1]+k.box[3])/2), k.center)


def test_a_knee_upside_down_is_turned_upright(tmp_path):
    "Its image is that of the film turned round, and what was drawn travels there and back within half a pixel."
    p = injured_knee(5_000_000, 'upside down', 'L', 384)
    up = replace(p, line=p.line[::-1, ::-1])
    a = expose(p, rng(0, 'injured', 'upside down'), marker=False).pixels
    films = {'down': a, 'up': np.ascontiguousarray(a[::-1, ::-1])}
    r = recipe('knee', size=96)
    for k, (name, pixels) in enumerate(films.items()):
        q = p if name=='down' else up
        dicom(tmp_path/f'{name}.dcm', q, k, 'L')
        ds = pydicom.dcmread(tmp_path/f'{name}.dcm')
        ds.PixelData = np.rint(pixels*4095).astype(np.uint16).tobytes()
        ds.save_as(tmp_path/f'{name}.dcm')
    s = preprocess_folder(tmp_path, tmp_path/'s', r, workers=1, show=False)
    down, upright = (s.position(f'{UID}{k}') for k in (0, 1))
    assert s.index.turned.iloc[[down, upright]].tolist()==[True, False] and s.index.doubtful[down]
    assert 'upside down' in s.index.reason[down] and 'turned upright' in s.index.reason[down]
    assert np.corrcoef(s[down].ravel(), s[upright].ravel())[0, 1]>.95
    h, w = a.shape
    film = s.radiograph(down)
    turned = s.radiograph(upright).affine@np.array([[-1, 0, w], [0, -1, h], [0, 0, 1]])
    assert np.abs(transform_points(film.affine, [(0, 0), (w, h)])-transform_points(turned, [(0, 0), (w, h)])).max()<3
    x, y = p.points['joint']
    table = pd.DataFrame([dict(image_id=f'{UID}0', label='joint', x=x, y=y, x1=x-40, y1=y-20, x2=x+10, y2=y+30)])
    at = stored_points(s, table, drawn_on='film')[['x', 'y']].to_numpy(float)
    box = stored_boxes(s, table, drawn_on='film')[XYXY].to_numpy(float)
    assert np.abs(film.to_stored(at)-[(x, y)]).max()<1e-6
    assert np.abs(to_film(box, s.index.iloc[down])-[(x-40, y-20, x+10, y+30)]).max()<1e-6
    spot = np.zeros((h, w), bool)
    spot[int(y)-20:int(y)+30, int(x)-40:int(x)+10] = True
    m = write_masks(s, {f'{UID}0': spot}, tmp_path/'m', show=False)[down]
    back = on_film(m>0, s.index.iloc[down])
    back = rle_decode(back['rle'], (h, w))
    middles = [np.argwhere(o).mean(0) for o in (spot, back)]
    assert np.abs(middles[0]-middles[1]).max()<.5 and (spot & back).sum()>.9*(spot | back).sum()
    heat = np.zeros((96, 96), np.float32)
    heat[tuple(np.int64(at[0][::-1]))] = 1
    hot = np.unravel_index(heat_to_stored(film, heat, (h, w)).argmax(), (h, w))
    # the middle of the hottest pixel of the image, within half of its size
    assert np.abs(np.add(hot, .5)-film.to_stored(np.floor(at)+.5)[0][::-1]).max()<=.5/abs(film.affine[0, 0])+.5


def test_the_ends_of_a_dislocated_knee_are_one():
    p = injured_knee(20_000_011, 'dislocation', 'L', 320)
    assert len(locate_knees(Radiograph(expose(p, rng(20_000_011)).pixels)))==1


@pytest.fixture(scope='module')
def run(films, store):
    "A run of one epoch: its labels also know a film that cannot be read, and one on which no knee is."
    folder, truth = films
    labels = labels_of(truth).assign(file=truth.file)
    more = pd.DataFrame([dict(image_id=f'{UID}{k}', file=f'{k}.dcm', fractured=1, side='') for k in (90, 91)])
    pd.concat([labels, more]).to_csv(folder/'labels.csv', index=False)
    (folder/'more').mkdir()
    (folder/'more'/'90.dcm').write_bytes(b'nothing'*40)
    dicom(folder/'more'/'91.dcm', simulate_knee(5, side='R', size=224), 91, '')
    ds = pydicom.dcmread(folder/'more'/'91.dcm')
    ds.PixelData = np.random.default_rng(0).integers(0, 4096, ds.Rows*ds.Columns, dtype=np.uint16).tobytes()
    ds.save_as(folder/'more'/'91.dcm')
    whole = preprocess_folder([folder/'xrays', folder/'more'], folder/'whole', store.recipe, workers=1,
        show=False)
    assert len(whole)==31 and len(whole.errors)==1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return train('knee', whole, folder/'labels.csv', folder/'run', arch='resnet10t', epochs=1, bs=8,
            pretrained=False)


def test_the_report_tells_who_was_left_out(films, run):
    record = json.loads((films[0]/'run'/'run.json').read_text())
    assert record['flow']['images of 22 files']==32 and record['flow']['used']==30 and record['flow'][
        'no knee found']==1
    rows = {r['value']: r for r in record['left_out']}
    broken = int(films[1].fractured.sum()) + 2
    assert (rows['1']['films'], rows['0']['films'])==(broken, 32-broken) and rows['0']['why']=={}
    assert rows['1']['why']=={'no knee found': 1,
        'unreadable': 1} and rows['1']['left out']['value']==2/broken
    m = pd.read_csv(films[0]/'run'/'manifest.csv')
    assert (m.groupby('patient_id').split.nunique()==1).all() and m.image_id.str.endswith(':left').sum()==10
    page = report(run, evaluate(run), audit=False)
    text = page.read_text(encoding='utf-8')
    assert 'Films left out, by label' in text and 'fractured = 1' in text and 'no knee found (1), unreadable (1)' in text
    assert '32 images of 22 files' in text


def test_each_knee_is_predicted_in_the_film(films, run, tmp_path):
    folder, truth = films
    paths = [folder/'xrays'/f for f in ('00.dcm', '01.dcm')]
    table = predict(run, paths, tmp_path/'p.csv', ('csv', 'json', 'png'), workers=1, show=False)
    assert table.image_id.tolist()==[f'{UID}0:right', f'{UID}0:left',
        f'{UID}1'] and table.side.tolist()[:2]==['R', 'L']
    assert table.knee_doubtful.tolist()==[False]*3
    for r in table.itertuples():
        own = truth[(truth.image_id==r.image_id.rsplit(':', 1)[0]) & (truth.side==r.side)].joint.iloc[0]
        assert np.hypot((r.x1+r.x2)/2-own[0], (r.y1+r.y2)/2-own[1])<6
    readings = json.loads((tmp_path/'p.json').read_text())['readings']
    assert [r['image_id'] for r in readings]==table.image_id.tolist() and all(r['findings'] for r in readings)
    assert len(list((tmp_path/'p').glob('*.png')))==3
    heat = explain(run, paths, tmp_path/'heat', workers=1, show=False)
    assert heat.picture.tolist()==['0001.png', '0002.png',
        '0003.png'] and len(list((tmp_path/'heat').glob('*.png')))==3


def test_each_knee_has_its_dicom_results(films, run, tmp_path):
    pytest.importorskip('highdicom')
    predict(run, [films[0]/'xrays'/'00.dcm'], tmp_path/'p.csv', ('sr', 'sc'), workers=1, show=False)
    results = pd.read_csv(tmp_path/'p_results.csv')
    assert results.error.isna().all() and len(results)==4 and results.uid.nunique()==4
    for f in results.file:
        ds = pydicom.dcmread(tmp_path/'p'/f)
        assert f'{UID}0' in str(ds) and ':left' not in str(ds)
