"""Starts of a chest network on real films, judged inside the strata of the known shortcut: chest_nih (1,394 films of
ChestX-ray14), 14 findings and "no finding", a small CNN and a small vision transformer.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/chest_nih.py pretrain --out FOLDER
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/chest_nih.py run --out FOLDER [--arms NAME ...] [--seeds 3]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/chest_nih.py table --out FOLDER [--part choice|test]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/chest_nih.py child --out FOLDER [--epochs 4] [--share .1]

random:      all weights random.                      lite0:  ImageNet weights of a package, the default of the tasks.
probe:       the frozen features of lite0, a logistic regression for each finding.
layer-wise:  lite0, rates rising from a hundredth at the first layers.
ssl:         self-supervision on all unlabelled chests here (films of test patients left out), from random weights;
lite0+ssl:   the same from lite0.                     @160:   at 160 pixels in place of 112, a third of the epochs less.

Patients are divided once: 50 % training, 12 % validation (the best epoch by mean AUROC), 13 % choice, 25 % test. `table
--part choice` is for choosing an arm; `--part test` is one look. Each arm but the probe sees as many images. Of each finding
with at least 8 positive patients in the part the AUROC is taken over all films and over pairs within source and view
(`stratified_auroc_ci`); the mean over the findings is compared with random weights of the same network, seed by seed, with
an interval over seeds and patients (benchmarks/seeds.py). Beside it stands what sees no anatomy: source and view, and
16 x 16 pixels, taught on the same training patients. With the radiologists' 124 films (ChestX-Det) as truth: pneumothorax,
effusion and consolidation of the patients that were not trained on.

`child`: a run of the chest task (nih14, lite0 from ImageNet, one seed) on the same training patients, judged on `chest_child`
as it comes (pneumonia or not, which is all that its labels say) and adapted with a share of its patients.
"""
import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from seeds import compared, over_seeds, shared_variance
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from radiology_ai.data.chest import NIH14
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.data.split import patient_split
from radiology_ai.metrics.ranking import auroc_ci
from radiology_ai.models.run import run_model
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.pretrain.ssl import save_body, ssl_learner
from radiology_ai.report.shortcuts import pixel_features, stratified_auroc_ci, thumbnails
from radiology_ai.tasks.kinds import said, stored_batches
from radiology_ai.tasks.registry import adapt, train
from radiology_ai.train.learner import xray_learner
from radiology_ai.vision.augment import BatchAugment

CNN, VIT, PACKAGE = 'tf_efficientnet_lite0', 'vit_tiny_patch16_224', 'efficientnet-lite0'
ARMS = {'cnn random': (CNN, 112), 'cnn lite0': (CNN, 112), 'cnn probe': (CNN, 112),
    'cnn layer-wise': (CNN, 112),
    'cnn ssl': (CNN, 112), 'cnn lite0+ssl': (CNN, 112), 'cnn random@160': (CNN, 160),
    'cnn lite0@160': (CNN, 160),
    'vit random': (VIT, 112), 'vit ssl': (VIT, 112)}
EPOCHS = {112: 4, 160: 3}
LABELS = [*NIH14, 'No Finding']
LEAST = 8 # positive patients of a finding that is judged


def folder() -> Path:
    return Path(os.environ['RADIOLOGY_AI_REAL_DATA'])


def films() -> pd.DataFrame:
    "One row a film: path, patient, source and view, the labels, split."
    m = pd.read_csv(folder()/'chest_nih'/'manifest.csv', dtype={'patient_id': str})
    m = m.assign(path=[str(folder()/'chest_nih'/p) for p in m.path],
        source=m.source.str.extract('github:([^/ ]+)')[0],
        **{'No Finding': (m.labels=='No Finding')*1.})
    m['stratum'] = m.source + ' ' + m['view']
    parts = {'train': .5, 'valid': .12, 'choice': .13, 'test': .25}
    return patient_split(m, parts, LABELS, seed=0)


def store_of(size: int, out: Path) -> tuple[ImageStore, pd.DataFrame]:
    t, where = films(), out/f'nih_{size}'
    store = (ImageStore(where) if where.exists()
        else preprocess_folder(t.path.tolist(), where, recipe('plain', size=size), workers=1, show=False))
    ids = dict(zip(store.index.path, store.index.image_id))
    return store, t.assign(image_id=t.path.map(ids))


def pretrain(args):
    "Bodies that have seen all unlabelled chests: of chest_nih those of training and validation patients."
    t = films()
    paths = t.path[t.split.isin(('train', 'valid'))].tolist()
    for name in ('chest_child', 'chest_covid'):
        m = pd.read_csv(folder()/name/'manifest.csv')
        paths += [str(folder()/name/p) for p in m.path]
    where = args.out/'unlabelled_112'
    store = (ImageStore(where) if where.exists()
        else preprocess_folder(paths, where, recipe('plain', size=112), workers=1, show=False))
    df = pd.DataFrame({'image_id': store.index.image_id, 'patient_id': store.index.image_id})
    df['split'] = np.where(np.arange(len(df))%20==0, 'valid', 'train')
    for arm, arch, method, start, epochs in (('cnn ssl', CNN, 'simclr', None, 8),
            ('cnn lite0+ssl', CNN, 'simclr', PACKAGE, 5),
            ('vit ssl', VIT, 'mae', None, 40)):
        file = args.out/f'{arm}.safetensors'
        if file.exists(): continue
        began = time.process_time()
        learn = ssl_learner(store, df, arch, method, bs=64, model_args=dict(weights=start) if start else None,
            dls_args=dict(device='cpu'), lr=1e-3)
        learn.fit_two_phase(epochs, head_epochs=0)
        save_body(learn, file)
        print(f'{arm}: {method}, {len(df)} films, {epochs} epochs, {time.process_time()-began:.0f} s of processor', flush=True)


def layers(model) -> list:
    "Four groups of parameters from the first layers to the head."
    net = model.body.net
    groups = [[net.conv_stem, net.bn1, *net.blocks[:3]], [*net.blocks[3:5]],
        [*net.blocks[5:], net.conv_head, net.bn2],
        [model.head]]
    return [[p for m in g for p in m.parameters()] for g in groups]


def rest(t: pd.DataFrame) -> pd.DataFrame:
    return t[t.split.isin(('choice', 'test'))]


def batches(store, rows):
    return stored_batches(store, [store.position(i) for i in rows.image_id], show=False)


def probe(store, t, args, seed):
    """Logits of a regression for each finding on frozen features; its penalty by folds of the training
    patients."""
    from radiology_ai.models.backbone import create_model
    model = create_model(CNN, 2, weights=PACKAGE)
    def features(rows): return run_model(model, batches(store, rows), ('features',))['features'].numpy()
    rows = t[t.split=='train']
    x, z = features(rows), features(rest(t))
    mean, std = x.mean(0), x.std(0)+1e-6
    folds, out = list(GroupKFold(5).split(x, groups=rows.patient_id)), np.zeros((len(z), len(LABELS)))
    for k, label in enumerate(LABELS):
        y = rows[label].to_numpy(int)
        if y.sum()<5 or any(y[a].sum()<1 for a, _ in folds): continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fit = LogisticRegressionCV(Cs=np.logspace(-5, -1, 5), cv=folds, scoring='neg_log_loss',
                max_iter=300)
            out[:,k] = fit.fit((x-mean)/std, y).decision_function((z-mean)/std)
    return out


def trained(arm, store, t, args, seed):
    arch, size = ARMS[arm]
    way = arm.split(' ', 1)[1].removesuffix('@160')
    start = {'lite0': PACKAGE, 'layer-wise': PACKAGE}.get(way)
    if 'ssl' in way: start = args.out/f'{arm}.safetensors'
    augment = BatchAugment(rotation=7, translation=.05, scale=(.92, 1.08), brightness=.1, contrast=.15,
        gamma=(.85, 1.18),
        noise=.01, seed=seed)
    part = t[t.split.isin(('train', 'valid'))]
    dls = xray_dataloaders(store, part, LABELS, bs=16, batch_tfms=[augment], seed=seed)
    learn = xray_learner(dls, arch, pretrained=False, seed=seed, lr=1e-3 if arch==VIT else 2e-3,
        model_args=dict(weights=start) if start else None)
    epochs, known = EPOCHS[size], start is not None
    if way=='layer-wise':
        learn.splitter = layers
        learn.create_opt()
        learn.fit_one_cycle(epochs, slice(learn.lr/100, learn.lr), pct_start=.25, div=10.)
    else: learn.fit_two_phase(epochs-known, head_epochs=int(known))
    return run_model(learn.model, batches(store, rest(t)))['logits'].numpy()


def run(args):
    for arm in args.arms or ARMS:
        store, t = store_of(ARMS[arm][1], args.out)
        for seed in range(args.seeds):
            file = args.out/f'{arm}-{seed}.npz'
            if file.exists() or arm=='cnn probe' and seed: continue
            began = time.process_time()
            z = probe(store, t, args, seed) if arm=='cnn probe' else trained(arm, store, t, args, seed)
            np.savez(file, logits=z, path=rest(t).path.to_numpy(str), seconds=time.process_time()-began)
            print(f'{time.strftime("%H:%M:%S")} {file.stem}: {time.process_time()-began:.0f} s', flush=True)


def within(y, s, strata) -> float:
    "The share of pairs of one stratum that are in order, NaN without any."
    good = pairs = 0.
    for k in np.unique(strata):
        a, b = s[(strata==k) & (y==1)], s[(strata==k) & (y==0)]
        if len(a) and len(b):
            ranks = rankdata(np.concatenate([a, b]))[:len(a)].sum()
            good, pairs = good + ranks - len(a)*(len(a)+1)/2, pairs + len(a)*len(b)
    return good/pairs if pairs else np.nan


def mean_within(y, s, strata) -> float:
    "The mean of `within` over the findings."
    return float(np.nanmean([within(y[:,k], s[:,k], strata) for k in range(y.shape[1])]))


def baselines(store, t, labels, part) -> dict:
    "Logits of what sees no anatomy, taught on the training patients."
    thumbs = pixel_features(thumbnails(store[store.position(i)] for i in t.image_id))['thumbnail']
    out, taught = {}, (t.split=='train').to_numpy()
    for name, x in (('source and view', pd.get_dummies(t.stratum).to_numpy(float)),
            ('16 x 16 pixels', thumbs)):
        x = (x-x[taught].mean(0))/(x[taught].std(0)+1e-6)
        weights = np.linalg.solve(x[taught].T@x[taught] + 100*np.eye(x.shape[1]),
            x[taught].T@(t[labels].to_numpy(float)[taught]
            - t[labels].to_numpy(float)[taught].mean(0)))
        out[name] = (x@weights)[(t.split==part).to_numpy()]
    return out


def table(args):
    warnings.simplefilter('ignore')
    store, t = store_of(112, args.out)
    rows = t[t.split==args.part].reset_index(drop=True)
    labels = [c for c in LABELS if rows.patient_id[rows[c]==1].nunique()>=LEAST]
    at = [LABELS.index(c) for c in labels]
    y = rows[labels].to_numpy(float)
    strata = pd.factorize(rows.stratum)[0]
    print(f"{args.part}: {len(rows)} films of {rows.patient_id.nunique()} patients; findings with {LEAST} positive patients: "
        + ', '.join(f'{c} {int(rows[c].sum())}' for c in labels) + '\n')
    print('| Start | mean AUROC | within source and view | no finding: AUROC | within source and view | '
        'seeds |\n|---|---|---|---|---|---|')
    def line(name, each):
        none = LABELS.index('No Finding')
        k = labels.index('No Finding')
        plain = np.mean([[auroc_ci(y[:,j], z[:,j], rows.patient_id)[0] for j in range(len(labels))]
            for z in each])
        mean = np.mean(each, 0)
        a = auroc_ci(y[:,k], mean[:,k], rows.patient_id)
        b = stratified_auroc_ci(y[:,k], mean[:,k], strata, rows.patient_id)
        inner = [mean_within(y, z, strata) for z in each]
        print(f"| {name} | {plain:.3f} | {np.mean(inner):.3f} ({', '.join(f'{v:.3f}' for v in inner)}) | "
            f"{a[0]:.3f} ({a[1]:.3f} to {a[2]:.3f}) | {b[0]:.3f} ({b[1]:.3f} to {b[2]:.3f}) | {len(each)} |")
        return none
    for name, z in baselines(store, t, labels, args.part).items(): line(name, [z])
    found, gains = {}, {}
    for arm in ARMS:
        files = [args.out/f'{arm}-{s}.npz' for s in range(args.seeds) if (args.out/f'{arm}-{s}.npz').exists()]
        if not files: continue
        each = []
        for f in files:
            kept = np.load(f)
            z = pd.DataFrame(kept['logits'][:,at], index=kept['path'])
            each.append(z.loc[rows.path].to_numpy())
        found[arm] = each
        line(arm, each)
    for arm, each in found.items():
        base = found.get(arm.split(' ')[0] + ' random' + ('@160' if arm.endswith('@160') else ''))
        if base is None or base is each or len(base)<2: continue
        pairs = list(zip(each if len(each)>1 else each*len(base), base))
        def gain(k, pairs=pairs):
            return [mean_within(y[k], a[k], strata[k]) - mean_within(y[k], b[k], strata[k]) for a, b in pairs]
        shared = shared_variance(gain, rows.patient_id, args.draws)
        gains[arm] = over_seeds(gain(np.arange(len(rows))), shared, rows.patient_id.nunique())
    print('\nGain over random weights of the same network, mean within source and view:')
    for arm, text in compared(gains).items(): print(f'  {arm}: {text}')
    outlined(found, rows, labels)


def outlined(found, rows, labels):
    "The same scores against the radiologists' outlines."
    p = pd.read_csv(folder()/'chest_nih'/'polygons_1024.csv')
    image = next(c for c in p if c.lower() in ('image', 'image_id', 'path', 'file'))
    names = next(c for c in p if c.lower() in ('label', 'finding', 'category', 'class'))
    seen = set(p[image].map(lambda v: Path(v).stem))
    part = rows[rows.path.map(lambda v: Path(v).stem).isin(seen)]
    print(f"\nAgainst the radiologists' outlines: {len(part)} films of {part.patient_id.nunique()} patients")
    for label in ('Effusion', 'Pneumothorax', 'Consolidation'):
        if label not in labels: continue
        drawn = {Path(v).stem for v in p[image][p[names].astype(str).str.lower()==label.lower()]}
        y = part.path.map(lambda v: Path(v).stem).isin(drawn).to_numpy(int)
        if min(y.sum(), (1-y).sum())<3 or part[label].nunique()<2:
            print(f'  {label}: {y.sum()} with it, {int(part[label].sum())} by the text-mined label, too few')
            continue
        mined = auroc_ci(y, part[label].to_numpy(float), part.patient_id)
        text = ', '.join(f"{arm} {v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" for arm, each in found.items()
            for v in [auroc_ci(y, np.mean(each, 0)[part.index, labels.index(label)], part.patient_id)])
        print(f'  {label}: {y.sum()} with it; the text-mined label {mined[0]:.2f} ({mined[1]:.2f} to {mined[2]:.2f}); {text}')


def child(args):
    "Children's films as the second hospital of a run."
    store, t = store_of(112, args.out)
    m = pd.read_csv(folder()/'chest_child'/'manifest.csv')
    files, where = [str(folder()/'chest_child'/p) for p in m.path], args.out/'child_112'
    other = (ImageStore(where) if where.exists()
        else preprocess_folder(files, where, recipe('plain', size=112), workers=1, show=False))
    ids = dict(zip(other.index.path, other.index.image_id))
    kids = pd.DataFrame({'image_id': [ids.get(f) for f in files], 'patient_id': m.patient_group,
        'Pneumonia': (m.labels!='normal')*1.}).dropna(subset='image_id')
    began = time.process_time()
    home = t[t.split!='choice'][['image_id', 'patient_id', 'split', *NIH14]]
    run = train('chest', store, home, args.out/'child_home', label_set='nih14', arch=CNN, weights=PACKAGE,
        epochs=args.epochs, bs=16, augment=2., lr=2e-3)
    done = adapt(run, other, kids, args.out/'child_adapted', share=args.share, replay=.3, epochs=args.epochs)
    print(f'{time.process_time()-began:.0f} s of processor; adapted with '
        f"{done.run.manifest[done.run.manifest.hospital.eq('new') & done.run.manifest.split.ne('test')].patient_id.nunique()} "
        'of their patients')
    for when, both in (('before', done.before), ('after', done.after)):
        for place, e in both.items():
            v = next(o for o in e.figures['labels'] if o['label']=='Pneumonia')
            print(f"{place} {when}: {v['images']} films of {v['patients']} patients, {v['positives']} with pneumonia, "
                f"AUROC {said(v['auroc'])}; mean of the categories {said(e.headline[1])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('pretrain', 'run', 'table', 'child'))
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--arms', nargs='*', choices=list(ARMS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--part', choices=('choice', 'test'), default='choice')
    parser.add_argument('--draws', type=int, default=500)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--share', type=float, default=.1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    {'pretrain': pretrain, 'run': run, 'table': table, 'child': child}[args.what](args)


if __name__=='__main__': main()
