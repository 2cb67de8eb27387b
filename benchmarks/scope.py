"""Does the out-of-scope filter keep the wanted films and nothing else? A mixed folder of DICOM files, learnt
from headers that are partly missing or wrong, judged on other patients.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/scope.py --settings real [--seeds 3] [--work DIR]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/scope.py --unseen layout [--part judged] [--work DIR]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/scope.py --unseen HIP [--work DIR]

Learnt: simulated knees, chests, hands and hips as DICOM of many makers. Of their headers 74 % are right, 13 %
say nothing, 6 % contradict themselves and 7 % name another part throughout.
  simulated   nothing else is learnt: real films are judged by a network that has never seen one
  real        also a part of the real films: knees (knee_oai, its own split `train`), chests (chest_nih and
              chest_child, half of the patients)
  no_hips     as `real`, without any hip; no_hands, no_chests, no_real_chests: likewise
Judged, the same folder for all: simulated films of other seeds, the other half of the real patients,
`chest_covid` (never learnt), the real DICOMs of `dicom`, `dicom_edge` and pydicom, broken files.
Nothing is chosen on judged films: temperature and limit of distance come from validation patients of the
learnt ones. Intervals: Wilson with the design effect of patients; unreadable files are counted apart.
A film is wanted if it shows a frontal knee.

`--unseen`: what was never learnt, on fewer films (`UNSEEN`): knees turned by a quarter and by a half, negatives, a chest from the side
(projections of one real CT), and other parts. `layout`: no network, only `weak.layout` from films that truly are knees,
so that every other part is unseen; what it takes for near is the most that a filter with it can accept. A part such
as HIP, HAND or CHEST: a whole filter learnt from headers without any film of it. `--part tried` are the films on which
k, share and the kind of features were chosen; `judged` are of other seeds and other patients.
Without RADIOLOGY_AI_REAL_DATA only `simulated` is run, on
simulated films.
"""
import os

for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[k] = '1'
import argparse
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

PARTS = ('KNEE', 'CHEST', 'HAND', 'HIP')
# simulated knees and others a part: first seed, counts; real films a source at most
UNSEEN = dict(learnt=(0, 360, 140, 220), tried=(1_000_000, 120, 60, 220), judged=(3_000_000, 200, 80, 220))
FATES = dict(right=.74, silent=.13, torn=.06, wrong=.07) # of headers
LEARNT = dict(KNEE=800, CHEST=300, HAND=300, HIP=300)    # simulated patients
JUDGED = dict(KNEE=600, CHEST=200, HAND=200, HIP=200)
MAKERS = (('FUJIFILM Corporation', 'MONOCHROME1', 10, 'linear'),
    ('Philips Medical Systems', 'MONOCHROME2', 12, 'lut'), ('SIEMENS', 'MONOCHROME2', 14, 'sigmoid'),
    ('Agfa', 'MONOCHROME2', 12, 'linear'),
          ('Canon Inc.', 'MONOCHROME2', 16, None), ('GE Healthcare', 'MONOCHROME1', 14, 'linear'))
WORDS = dict(KNEE=('Knee AP', 'Knie ap', 'Rodilla AP', 'GENOU FACE', 'Ginocchio'),
    CHEST=('Chest PA', 'Thorax p.a.', 'TORAX PA', 'THORAX FACE'),
    HAND=('Hand PA', 'Mano AP', 'MAIN DROITE', 'Hand dp'),
             HIP=('Hip AP', 'Hüfte ap', 'CADERA', 'BASSIN FACE', 'Pelvis'))


def header(part, gen, patient, key):
    "Header elements of a film of `part`: right, silent, torn (two values contradict) or wrong."
    fate = str(gen.choice(list(FATES), p=list(FATES.values())))
    other = str(gen.choice([p for p in PARTS if p!=part]))
    tag, words = {'right': (part, part), 'silent': (None, None), 'torn': (other, part),
        'wrong': (other, other)}[fate]
    if fate=='right' and gen.random()<.4: tag, words = (None, words) if gen.random()<.5 else (tag, None)
    from radiology_ai.phantom.hospital import made_up_uid
    return fate, dict(PatientID=patient, BodyPartExamined=tag,
        SeriesDescription=str(gen.choice(WORDS[words])) if words else 'W012 Standard', StudyDescription=None,
        ViewPosition=None,
        SOPInstanceUID=made_up_uid('scope', key), StudyInstanceUID=made_up_uid('scope study', key),
        SeriesInstanceUID=made_up_uid('scope series', key))


def simulated(job):
    "Simulate and write one film; its row of the truth."
    folder, part, seed, broken = job
    import cv2
    cv2.setNumThreads(1)
    from radiology_ai.core import rng
    from radiology_ai.phantom.chest import simulate_chest
    from radiology_ai.phantom.hospital import break_file, write_dicom
    from radiology_ai.phantom.knee import simulate_knee
    from radiology_ai.phantom.limbs import simulate_hand, simulate_hip
    from radiology_ai.phantom.xray import expose
    gen, side = rng(seed, 'scope', part), 'RL'[seed%2]
    if part=='KNEE':
        p = simulate_knee(seed, grade=int(gen.choice([0, 0, 0, 1, 2, 3, 4, 5, 6])), side=side, size=256,
            bilateral=bool(gen.random()<.05), hardware=bool(gen.random()<.05))
    elif part=='CHEST': p = simulate_chest(seed, opacities=int(gen.choice([0, 0, 1, 2])), size=256)
    else: p = (simulate_hand if part=='HAND' else simulate_hip)(seed, side=side, size=256)
    pixels = expose(p, gen).pixels
    (h, w), cut = pixels.shape, gen.uniform(0, .06, 4)
    pixels = np.ascontiguousarray(pixels[int(cut[0]*h):h-int(cut[1]*h), int(cut[2]*w):w-int(cut[3]*w)])
    fate, tags = header(part, gen, f'SIM-{part}-{seed}', f'{part} {seed}')
    maker, photometric, bits, window = MAKERS[gen.integers(len(MAKERS))]
    path = Path(folder)/f'{part.lower()}_{seed}.dcm'
    write_dicom(path, pixels, p, photometric=photometric, bits=bits, window=window,
        syntax='jpeg_lossless' if broken else str(gen.choice(['explicit', 'implicit', 'jpeg_lossless',
        'rle'])), header=tags | dict(Manufacturer=maker))
    if broken: break_file(path, broken, gen)
    return dict(path=str(path), part=part, patient=f'SIM-{part}-{seed}', source='simulated', fate=fate,
        broken=bool(broken))


def converted(job):
    "Write a real film without header as DICOM with one; its row of the truth."
    folder, file = job[:2]
    part, patient, source = job[2:]
    from radiology_ai.core import rng
    from radiology_ai.dicom.read import read_radiograph
    from radiology_ai.phantom.hospital import write_dicom
    key = f'{source} {Path(file).stem}'
    fate, tags = header(part, rng(0, key), f'{source}-{patient}', key)
    path = Path(folder)/f'{source}_{Path(file).stem}.dcm'
    write_dicom(path, read_radiograph(file).pixels, bits=8, window=None,
        header=tags | dict(ImageLaterality=None, ImagerPixelSpacing=None))
    return dict(path=str(path), part=part, patient=f'{source}-{patient}', source=source, fate=fate,
        broken=False)


def real_films(data):
    """Real films as (file, part, patient, source, learnt): half of the patients of chest_nih and chest_child
    and the knees of `train` may be learnt."""
    out = []
    for name, who, part, most in (('knee_oai', 'patient', 'KNEE', None),
            ('chest_nih', 'patient_id', 'CHEST', 500), ('chest_child', 'patient_group', 'CHEST', 500),
            ('chest_covid', 'patient', 'CHEST', None)):
        t = pd.read_csv(data/name/'manifest.csv')
        t['patient_key'] = t[who].astype(str)
        first = {p: k for k, p in enumerate(sorted(t.patient_key.unique(), key=lambda p: hash_of(p)))}
        learnt = (t.patient_key.isin(set(t[t.split=='train'].patient_key)) if name=='knee_oai'
            else t.patient_key.map(first)%2==0 if name!='chest_covid' else pd.Series(False, t.index))
        for is_learnt, rows in t.groupby(learnt):
            rows = rows.assign(k=rows.path.map(hash_of)).sort_values('k').head(most or len(rows))
            out += [(str(data/name/r.path), part, r.patient_key, name, bool(is_learnt))
                for r in rows.itertuples()]
    return out


def hash_of(text):
    import hashlib
    return hashlib.sha256(text.encode()).hexdigest()


def loose_files(data):
    "The real DICOMs: path, part by their manifest, source."
    import pydicom
    out = []
    def part(words):
        return next((k for k, w in (('CHEST', 'chest'), ('HIP', 'hip'), ('LEG', 'tibia'), ('HAND', 'hand'),
            ('KNEE', 'knee'), ('LEG', 'leg')) if w in words.lower()), 'OTHER')
    for name in ('dicom', 'dicom_edge'):
        said = pd.read_csv(data/name/'manifest.csv').set_index('path')['labels'].to_dict()
        out += [(str(f), part(str(said.get(f.name, ''))), name) for f in sorted((data/name).glob('*.dcm'))]
    roots = [Path(pydicom.__file__).parent/'data/test_files']
    more = find_spec('data_store')
    if more: roots.append(Path(more.origin).parent/'data')
    for root in roots:
        out += [(str(f), 'OTHER', 'pydicom') for f in sorted(root.rglob('*.dcm'))]
    return out


def make_folders(work, data, workers):
    "Both folders with their truth.csv, once."
    from radiology_ai.parallel import run_parallel
    from radiology_ai.phantom.hospital import BREAKS
    for name, counts, first in (('learnt', LEARNT, 0), ('judged', JUDGED, 2_000_000)):
        if (work/f'{name}.csv').exists(): continue
        (work/name).mkdir(parents=True, exist_ok=True)
        jobs = [(str(work/name), part, first+i, '') for part, n in counts.items() for i in range(n)]
        if name=='judged':
            jobs += [(str(work/name), 'KNEE', first+900_000+i, how)
                for i, how in enumerate([h for h in BREAKS for _ in range(3)])]
        rows = list(run_parallel(simulated, jobs, workers, chunk=16, show=False))
        if data:
            films = [f for f in real_films(data) if f[4]==(name=='learnt')]
            rows += list(run_parallel(converted, [(str(work/name), *f[:4]) for f in films], workers, chunk=32,
                show=False))
            if name=='judged':
                rows += [dict(path=p, part=part, patient=Path(p).name.split('_')[0], source=s, fate='',
                    broken=False) for p, part, s in loose_files(data)]
        pd.DataFrame(rows).to_csv(work/f'{name}.csv', index=False)


def stores(work, size, workers):
    "Index and store of both folders."
    from radiology_ai.dicom.index import index_dicoms
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.preprocess.scale import preprocess_folder
    out = {}
    for name in ('learnt', 'judged'):
        truth = pd.read_csv(work/f'{name}.csv', keep_default_na=False)
        index = index_dicoms(list(truth.path), workers, show=False)
        out[name] = truth, index, preprocess_folder(index, work/f'{name}_{size}', recipe('plain', size=size),
            workers=workers, show=False)
    return out


def learn_filter(setting, seed, folder, args):
    "A filter learnt from the headers of the films of a setting; `folder` is one of `stores`."
    truth, index, store = folder
    from radiology_ai.weak.headers import metadata_labels
    from radiology_ai.weak.scope import OutOfScope, scope_learner, scope_manifest
    leave = {'no_hips': 'HIP', 'no_hands': 'HAND', 'no_chests': 'CHEST'}.get(setting)
    use = truth[(truth.part!=leave) & ((truth.source=='simulated') | (setting!='simulated'))
        & ~((setting=='no_real_chests') & truth.source.str.startswith('chest'))]
    labels = metadata_labels(index[index.path.isin(use.path)])
    if leave: labels['label'] = labels.label.where(labels.label!=leave, 'OTHER')
    manifest = scope_manifest(store, 'KNEE', labels, seed=seed)
    learn = scope_learner(store, manifest, args.arch, pretrained=False, seed=seed, outliers=args.outliers,
        mixup=args.mixup, lr=args.lr)
    learn.fit_two_phase(args.epochs)
    return OutOfScope.fit(learn, 'KNEE', draws=args.draws, slack=args.slack), manifest, labels


def judge(table):
    "Rows of figures: what, share and interval, films, patients."
    from radiology_ai.metrics.intervals import proportion_ci
    read = table[(table.decision!='unreadable')]
    rows = []
    def add(what, films, decision):
        if len(films):
            rows.append((what, decision, len(films), films.patient.nunique(),
                *proportion_ci(films.decision==decision, groups=films.patient)))
    def sure(what, films):
        rows.append((what, 'sure, near or not', len(films), films.patient.nunique(),
            *proportion_ci(films.confidence>=.95, groups=films.patient)))
    knees, others = read[read.part=='KNEE'], read[read.part!='KNEE']
    for source, t in knees.groupby('source'): add(f'knees, {source}', t, 'wanted')
    for fate, t in knees[knees.source=='simulated'].groupby('fate'):
        add(f'knees, simulated, header {fate}', t, 'wanted')
    add('others, all', others, 'wanted')
    sure('knees, simulated', knees[knees.source=='simulated'])
    sure('others, all', others)
    for (source, part), t in others.groupby(['source', 'part']):
        add(f'others, {source} {part.lower()}', t, 'wanted')
    for what, t in (('knees', knees), ('others', others)):
        for source, s in t.groupby('source'): add(f'{what}, {source}', s, 'unsure')
    return pd.DataFrame(rows, columns=['films', 'decision', 'n', 'patients', 'share', 'low', 'high'])


def side_chests(folder, data):
    "Projections of the real CT from the side, of 60 to 120 degrees; rows of the truth."
    import gzip

    import cv2

    from radiology_ai.phantom.hospital import write_dicom
    raw = gzip.decompress((data/'ct_chest/cxr.nii.gz').read_bytes())
    shape, kind = np.frombuffer(raw, '<i2', 3, 42), np.frombuffer(raw, '<i2', 1, 70)[0]
    mm, start = np.frombuffer(raw, '<f4', 3, 80), int(np.frombuffer(raw, '<f4', 1, 108)[0])
    slope, plus = np.frombuffer(raw, '<f4', 2, 112)
    hu = np.frombuffer(raw, {4: '<i2', 8: '<i4', 16: '<f4', 64: '<f8'}[int(kind)], int(np.prod(shape)), start)
    hu = hu.reshape(shape, order='F').astype(np.float32)*(slope or 1)+plus
    dense, rows = np.clip(hu[::2, ::2]+1000, 0, None), []
    h, w = dense.shape[:2]
    for angle in range(60, 121, 10):
        m = cv2.getRotationMatrix2D((w/2, h/2), angle, 1)
        a = np.stack([cv2.warpAffine(np.ascontiguousarray(dense[..., k]), m, (w, h)).sum(0)
            for k in range(dense.shape[2])])[::-1]
        a = cv2.resize(a, (256, max(1, round(256*a.shape[0]*mm[2]/(w*2*mm[0])))), interpolation=cv2.INTER_AREA)
        path = Path(folder)/f'ct_{angle}.dcm'
        gen_tags = header('CHEST', np.random.default_rng(angle), 'ct', f'ct {angle}')
        write_dicom(path, (a/a.max()).astype(np.float32), bits=12, window=None, header=gen_tags[1])
        rows.append(dict(path=str(path), part='LATERAL', patient='ct', source='ct_chest', fate=gen_tags[0],
            broken=False))
    return rows


def make_unseen(work, data, names, workers):
    "Folders of `UNSEEN` with their tables, once: real patients of one table are in no other."
    from radiology_ai.parallel import run_parallel
    for name in names:
        first, knees, rest, most = UNSEEN[name]
        if (work/f'{name}.csv').exists(): continue
        (work/name).mkdir(parents=True, exist_ok=True)
        jobs = [(str(work/name), p, first+i, '') for p in PARTS for i in range(knees if p=='KNEE' else rest)]
        rows = list(run_parallel(simulated, jobs, workers, chunk=16, show=False))
        if data:
            films = pd.DataFrame(real_films(data), columns=['file', 'part', 'patient', 'source', 'learnt'])
            even = films.patient.map(hash_of).str[-1].isin(list('02468ace'))
            films = films[films.learnt if name=='learnt' else ~films.learnt & (even==(name=='tried'))]
            films = films.assign(k=films.file.map(hash_of)).sort_values('k').groupby('source').head(most)
            rows += list(run_parallel(converted, [(str(work/name), f.file, f.part, f.patient, f.source)
                for f in films.itertuples()], workers, chunk=32, show=False))
        pd.DataFrame(rows).to_csv(work/f'{name}.csv', index=False)


def unseen_store(work, name, size, data, workers):
    "Truth and store of one of `UNSEEN`; of films that are judged also the real DICOMs and the chest from the side."
    from radiology_ai.dicom.index import index_dicoms
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.preprocess.scale import preprocess_folder
    truth = pd.read_csv(work/f'{name}.csv', keep_default_na=False)
    index = index_dicoms(list(truth.path), workers, show=False)
    stores = [preprocess_folder(index, work/f'{name}_{size}', recipe('plain', size=size), workers=workers, show=False)]
    truths = [truth.set_index('path').reindex(stores[0].index.path)]
    if data and name!='learnt':
        more = work/f'{name}_more'
        more.mkdir(exist_ok=True)
        rows = [dict(path=p, part=part, patient=Path(p).name.split('_')[0], source=s) for p, part, s
            in loose_files(data) if s=='dicom'] + side_chests(more, data)
        truths.append(pd.DataFrame(rows).set_index('path'))
        stores.append(preprocess_folder(list(truths[1].index), work/f'{name}_more_{size}', recipe('plain', size=size),
            workers=workers, show=False))
        truths[1] = truths[1].reindex(stores[1].index.path)
    return truths, stores


def pictures(stores): return np.concatenate([np.stack([s[i] for i in range(len(s))]) for s in stores])/np.float32(255)


def accepted_rows(truth, accepted, changed):
    "Share that is accepted: of knees, of other parts, and of knees turned or inverted (`changed`, by name)."
    from radiology_ai.metrics.intervals import proportion_ci
    rows = []
    def add(what, films, ok):
        p = proportion_ci(ok, groups=films.patient.astype(str))
        rows.append((what, len(films), films.patient.nunique(), p.value, p.low, p.high))
    for (source, part), t in truth.groupby(['source', 'part'], sort=True):
        add(f'{source} {part.lower()}', t, accepted[((truth.source==source) & (truth.part==part)).to_numpy()])
    knees = truth[truth.part=='KNEE']
    add('knees, all', knees, accepted[(truth.part=='KNEE').to_numpy()])
    add('others, all', truth[truth.part!='KNEE'], accepted[(truth.part!='KNEE').to_numpy()])
    for how, ok in changed.items(): add(f'knees, {how}', knees, ok)
    return pd.DataFrame(rows, columns=['films', 'n', 'patients', 'share', 'low', 'high'])


CHANGES = dict(left=lambda a: np.rot90(a, 1, (1, 2)), down=lambda a: a[:, ::-1, ::-1],
    right=lambda a: np.rot90(a, 3, (1, 2)), negative=lambda a: 1-a)


def unseen(args, data, work):
    "The part `--unseen`, printed."
    from radiology_ai.weak.layout import Layout, film_layout
    make_unseen(work, data, ('learnt', args.part), args.workers)
    (known,), (store,) = unseen_store(work, 'learnt', args.size, data, args.workers)
    truths, stores = unseen_store(work, args.part, args.size, data, args.workers)
    truth, films = pd.concat(truths), pictures(stores)
    knees = (truth.part=='KNEE').to_numpy()
    if args.unseen=='layout':
        own = (known.part=='KNEE').to_numpy()
        held = known.patient.map(hash_of).str[0].isin(list('0123')).to_numpy()
        layouts = film_layout(pictures([store])[own])
        look = Layout.fit(layouts[~held[own]], layouts[held[own]])
        print(f'layout of {int((own & ~held).sum())} knees, limit of {int((own & held).sum())} others: '
            f'{look.limit:.3f}; asked otherwise: {", ".join(look.otherwise)}')
        near = lambda a: look.doubt(film_layout(a))<=1
    else:
        near = unseen_filter(args, known, store)
    table = accepted_rows(truth, near(films), {k: near(c(films[knees])) for k, c in CHANGES.items()})
    print(table.to_string(index=False, float_format=lambda v: f'{v:.4f}'), flush=True)


def unseen_filter(args, known, store):
    "What a filter learnt without `args.unseen` accepts, as a function of pictures (N, H, W)."
    import torch

    from radiology_ai.weak.headers import metadata_labels
    from radiology_ai.weak.scope import OutOfScope, predicted, scope_learner, scope_manifest
    labels = metadata_labels(store.index[(known.part!=args.unseen).to_numpy()])
    labels['label'] = labels.label.where(labels.label!=args.unseen, 'OTHER')
    learn = scope_learner(store, scope_manifest(store, 'KNEE', labels), args.arch, pretrained=False,
        outliers=args.outliers, mixup=args.mixup, lr=args.lr)
    learn.fit_two_phase(args.epochs)
    scope = OutOfScope.fit(learn, 'KNEE', draws=args.draws, slack=args.slack)
    def accept(films):
        batches = torch.from_numpy(np.ascontiguousarray(films))[:, None].split(64)
        logits, *seen = predicted(learn.model, batches, args.draws)
        print(f'  by confidence and features alone: '
            f'{np.mean((scope.confidence(logits)>=.95) & (scope.near.distance(seen[0])<=scope.near.limit)):.4f}')
        return scope.decide(logits, *seen)=='wanted'
    return accept


def options():
    "Of the command line."
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--settings', default='simulated,real,no_hips')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--work', type=Path,
        help='a folder that keeps films and stores; None: a temporary one')
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--arch', default='resnet10t')
    parser.add_argument('--epochs', type=int, default=14)
    parser.add_argument('--lr', type=float, default=4e-3)
    parser.add_argument('--mixup', type=float, default=.2)
    parser.add_argument('--outliers', type=float, default=.25)
    parser.add_argument('--draws', type=int, default=4)
    parser.add_argument('--slack', type=float, default=2.)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--unseen', choices=['layout', 'HIP', 'HAND', 'CHEST'],
        help='what was never learnt: by the layout alone, or a filter learnt without this part')
    parser.add_argument('--part', default='judged', choices=['tried', 'judged'])
    parser.add_argument('--out', type=Path, help='a CSV for the decisions on all films')
    return parser.parse_args()


def run(setting, seed, sets, args):
    "Learn a filter and judge the same folder: its table of figures, printed."
    truth, _, store = sets['judged']
    start = time.perf_counter()
    scope, manifest, labels = learn_filter(setting, seed, sets['learnt'], args)
    known = labels.merge(sets['learnt'][0], on='path')
    unsure, other = known.label=='unsure', known.label.isin(['unsure', 'OTHER'])
    taught = time.perf_counter()-start
    table = scope.sort(store).merge(truth, on='path')
    each = (time.perf_counter()-start-taught)/len(store)*1e3
    print(f"\n{setting}, seed {seed}: {len(manifest)} weak labels, {int(unsure.sum())} unsure, "
        f"{int(((known.label!=known.part) & ~other).sum())} wrong; temperature {scope.scaling.temperature:.2f}, "
        f"{len(scope.suspects)} headers contradicted, {taught:.0f} s to learn, {each:.0f} ms a film")
    figures = judge(table).assign(setting=setting, seed=seed)
    if args.out:
        path = args.out.with_name(f'{args.out.stem}_{setting}_{seed}.csv')
        table.assign(setting=setting, seed=seed).to_csv(path, index=False)
    print(figures.drop(columns=['setting', 'seed']).to_string(index=False, float_format=lambda v: f'{v:.4f}'),
        flush=True)
    return figures


def main():
    args = options()
    import torch
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    data = os.environ.get('RADIOLOGY_AI_REAL_DATA')
    data = Path(data) if data else None
    with tempfile.TemporaryDirectory() as tmp:
        work, start = args.work or Path(tmp), time.perf_counter()
        work.mkdir(parents=True, exist_ok=True)
        if args.unseen: return unseen(args, data, work)
        make_folders(work, data, args.workers)
        sets = stores(work, args.size, args.workers)
        truth, _, store = sets['judged']
        print(f"{len(sets['learnt'][0])} films to learn from, {len(truth)} to judge, {len(store.errors)} of "
            f"these not readable or copies; {time.perf_counter()-start:.0f} s", flush=True)
        settings = [s for s in args.settings.split(',') if data or s=='simulated']
        t = pd.concat([run(s, seed, sets, args) for s in settings for seed in range(args.seeds)])
        print('\nOver seeds: mean (least to most)')
        print(t.groupby(['setting', 'films', 'decision'],
            sort=False).share.agg(['mean', 'min', 'max']).map(lambda v: f'{v:.4f}').to_string())


if __name__=='__main__': main()
