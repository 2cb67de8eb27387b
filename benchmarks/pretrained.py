"""A start from ImageNet weights that a Python package holds (`efficientnet-lite0`), beside random weights of the same
network with the same images seen: knees (OAI, Kellgren-Lawrence grade 2 or more) and chests (Kermany 2018, pneumonia
in children) at 112, 160 and 224 pixels.

    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/pretrained.py run --out FOLDER [--data knee chest]
        [--sizes 112 160 224] [--arms random probe two-phase layer-wise] [--seeds 3]
    python benchmarks/pretrained.py table --out FOLDER
    python benchmarks/pretrained.py look --out FOLDER --arms random two-phase
    python benchmarks/pretrained.py calibration --out FOLDER [--seeds 1]

random:     `tf_efficientnet_lite0` from random weights, all of it trained.
probe:      the body frozen, a logistic regression on its features (its penalty by folds of the training patients).
two-phase:  `fit_two_phase`, the default of the tasks: one epoch of the head, then everything, the body at a tenth of
            the rate.
layer-wise: everything from the first step, four groups of layers whose rates rise from a hundredth to the head's.
resnet18:   from random weights, for as many images as take the same time: what a task starts from without the package.

Patients are divided once into four parts: training, validation (the best epoch is kept by them), choice and test. The
figures of `table` are of the patients of the choice, which no epoch was picked by; `look` compares two arms on the
test patients and is meant for one look. Seeds draw weights, batches and augmentation. All arms of a size see as many
images, so that they take the same time; the seconds are processor time of training with its validations. A run that is
in the folder is not run again. The data have shortcuts: the knees are crops from one study, the chests were squashed to
squares, and the healthy ones come from other examinations (their source alone tells much): the figures compare starts.

`calibration` trains the knee task on a rare label (grade 4) with batches of which half are positive, and says how the
probabilities of its test patients are calibrated as they come, after a temperature and after Platt's line, both fitted
on the validation patients; then the same of heads on frozen features that were trained to the end on classes of equal
weight, over ten divisions of the patients.
"""
import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from radiology_ai.data.load import xray_dataloaders
from radiology_ai.data.split import patient_split
from radiology_ai.metrics.calibration import calibration as calibration_of
from radiology_ai.metrics.calibration import calibration_ci
from radiology_ai.metrics.ranking import auroc, auroc_ci, delong_test
from radiology_ai.metrics.recalibration import PlattScaling, TemperatureScaling
from radiology_ai.models.backbone import create_model
from radiology_ai.models.run import run_model
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.tasks.kinds import stored_batches
from radiology_ai.tasks.registry import train
from radiology_ai.train.learner import xray_learner
from radiology_ai.vision.augment import BatchAugment

ARCH, WEIGHTS = 'tf_efficientnet_lite0', 'efficientnet-lite0'
IMAGES = {'train': 256, 'valid': 100, 'choice': 160, 'test': 300} # about so many, the same of both sets
EPOCHS = {112: 5, 160: 3, 224: 2}
SLOWER = 1.3 # a step of resnet18 takes so many times that of lite0


def images(data: str) -> pd.DataFrame:
    "The images with patient, label `y` and split."
    folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/{'knee': 'knee_oai', 'chest': 'chest_child'}[data]
    t = pd.read_csv(folder/'manifest.csv', dtype={'patient': str, 'patient_group': str})
    if data=='knee': t = t.assign(patient_id=t.patient, y=(t.kl>=2).astype(int))
    else: t = t.assign(patient_id=t.patient_group, y=(t.binary!='NORMAL').astype(int))
    left = len(t) - sum(IMAGES.values())
    parts = {k: n/len(t) for k, n in IMAGES.items()} | ({'unused': left/len(t)} if left/len(t)>.01 else {})
    parts = {k: v/sum(parts.values()) for k, v in parts.items()}
    t = patient_split(t.assign(path=[str(folder/p) for p in t.path]), parts, 'y', seed=0)
    return t.loc[t.split!='unused', ['path', 'patient_id', 'y', 'split']].reset_index(drop=True)


def store_of(data: str, size: int, out: Path) -> tuple[ImageStore, pd.DataFrame]:
    "The images of one set at a size, and their table with `image_id`."
    t, folder = images(data), out/f'{data}_{size}'
    store = (ImageStore(folder) if folder.exists()
        else preprocess_folder(t.path.tolist(), folder, recipe('plain', size=size), workers=1, show=False))
    ids = dict(zip(store.index.path, store.index.image_id))
    return store, t.assign(image_id=t.path.map(ids))


def layers(model) -> list:
    "Four groups of parameters from the first layers to the head."
    net = model.body.net
    groups = [[net.conv_stem, net.bn1, *net.blocks[:3]], [*net.blocks[3:5]], [*net.blocks[5:], net.conv_head,
        net.bn2], [model.head]]
    return [[p for m in g for p in m.parameters()] for g in groups]


def scores(model, store, rows) -> np.ndarray:
    "The probability of class 1."
    batches = stored_batches(store, [store.position(i) for i in rows.image_id], show=False)
    return run_model(model, batches)['logits'].softmax(1)[:, 1].numpy()


def probe(store, t, size, seed) -> tuple:
    "Scores of the parts, seconds and images seen of a regression on frozen features."
    start = time.process_time()
    model = create_model(ARCH, 2, weights=WEIGHTS)
    def features(rows):
        batches = stored_batches(store, [store.position(i) for i in rows.image_id], show=False)
        return run_model(model, batches, ('features',))['features'].numpy()
    train = t[t.split=='train']
    x = features(train)
    folds = list(GroupKFold(5).split(x, train.y, train.patient_id))
    fit = LogisticRegressionCV(Cs=np.logspace(-4, 1, 11), cv=folds, scoring='roc_auc', max_iter=500).fit(
        (x-x.mean(0))/(x.std(0)+1e-6), train.y)
    seconds = time.process_time()-start
    told = {k: fit.decision_function((features(t[t.split==k])-x.mean(0))/(x.std(0)+1e-6)) for k in (
        'choice', 'test')}
    return told, seconds, len(train)


def trained(arm, store, t, size, seed) -> tuple:
    "The same of a trained network."
    known = arm in ('two-phase', 'layer-wise')
    epochs = EPOCHS[size] if arm!='resnet18' else max(1, round(EPOCHS[size]/SLOWER))
    augment = BatchAugment(rotation=10, translation=.06, scale=(.9, 1.1), brightness=.15, contrast=.2,
        gamma=(.8, 1.25), noise=.02, seed=seed)
    dls = xray_dataloaders(store, t, 'y', bs=16, batch_tfms=[augment], seed=seed)
    learn = xray_learner(dls, 'resnet18' if arm=='resnet18' else ARCH, pretrained=False, seed=seed,
        model_args={'weights': WEIGHTS} if known else None)
    start = time.process_time()
    if arm=='layer-wise':
        learn.splitter = layers
        learn.create_opt()
        learn.fit_one_cycle(epochs, slice(learn.lr/100, learn.lr), pct_start=.25, div=10.)
    else: learn.fit_two_phase(epochs-known, head_epochs=int(known))
    seconds = time.process_time()-start
    told = {k: scores(learn.model, store, t[t.split==k]) for k in ('choice', 'test')}
    return told, seconds, epochs*int((t.split=='train').sum())


def run(args):
    for data in args.data:
        for size in args.sizes:
            store, t = store_of(data, size, args.out)
            for seed in range(args.seeds):
                for arm in args.arms:
                    file = args.out/f'{data}-{size}-{arm}-{seed}.npz'
                    if file.exists() or arm=='probe' and seed: continue
                    told, seconds, seen = (probe(store, t, size, seed) if arm=='probe'
                        else trained(arm, store, t, size, seed))
                    np.savez(file, **told, seconds=seconds, seen=seen)
                    print(f'{time.strftime("%H:%M:%S")} {file.stem}: {seconds:.0f} s, {seen} images',
                        flush=True)


def kept(args, data, size, arm) -> list:
    "What the seeds of an arm left."
    found = [np.load(args.out/f'{data}-{size}-{arm}-{s}.npz') for s in range(args.seeds)
        if (args.out/f'{data}-{size}-{arm}-{s}.npz').exists()]
    return found


def t_interval(x) -> str:
    "The mean with Student's 95 % interval over seeds."
    from scipy.stats import t
    x = np.asarray(x, float)
    if len(x)<2: return f'{x.mean():.3f} (one run)'
    half = t.ppf(.975, len(x)-1)*x.std(ddof=1)/np.sqrt(len(x))
    return f'{x.mean():.3f} ({x.mean()-half:.3f} to {x.mean()+half:.3f}; {len(x)} seeds)'


def table(args):
    for data in args.data:
        t = images(data)
        rows = t[t.split=='choice']
        print(f"\n{data}: " + ', '.join(f"{k} {len(g)} images of {g.patient_id.nunique()} patients, {g.y.sum()} with it"
            for k, g in t.groupby('split')) + '\n')
        print('| Pixels | Start | AUROC, patients of the choice: mean over seeds | Each seed | '
            'Seconds (processor) | Images seen |\n|---|---|---|---|---|---|')
        for size in args.sizes:
            for arm in args.arms:
                found = kept(args, data, size, arm)
                if not found: continue
                each = [auroc(rows.y, f['choice']) for f in found]
                print(f"| {size} | {arm} | {t_interval(each)} | {', '.join(f'{v:.3f}' for v in each)} | "
                    f"{np.mean([f['seconds'] for f in found]):.0f} | {int(found[0]['seen'])} |")


def look(args):
    "The second arm against the first on the test patients."
    first, second = args.arms
    for data in args.data:
        rows = images(data)
        rows = rows[rows.split=='test']
        for size in args.sizes:
            a, b = kept(args, data, size, second), kept(args, data, size, first)
            if not a or not b: continue
            a, b = ([f['test'] for f in found] for found in (a, b))
            n = min(len(a), len(b)) if min(len(a), len(b))>1 else 1
            gains = [auroc(rows.y, p) - auroc(rows.y, q) for p, q in zip(a[:n], b[:n])]
            d = delong_test(rows.y, np.mean(a, 0), np.mean(b, 0), rows.patient_id)
            print(f'{data} {size}: {second} {auroc_ci(rows.y, np.mean(a, 0), rows.patient_id)}, {first} '
                f'{auroc_ci(rows.y, np.mean(b, 0), rows.patient_id)} (mean scores of the seeds)\n'
                f'    gain over seeds {t_interval(gains)}; over patients {d.difference}, p = {d.p:.2g}')


def calibration(args):
    "A task's run with balanced batches: the errors of its probabilities on the test patients by the rule."
    folder = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'knee_oai'
    t = pd.read_csv(folder/'manifest.csv', dtype={'patient': str})
    files = [str(folder/p) for p in t.path]
    labels = pd.DataFrame({'path': files, 'patient_id': t.patient, 'kl4': (t.kl==4).astype(int)})
    store = preprocess_folder(files, args.out/'knees', recipe('plain', size=112), workers=1, show=False)
    for seed in range(args.seeds):
        run = train('knee', store, labels, args.out/f'balanced_{seed}', label='kl4', arch=ARCH,
            weights=WEIGHTS,
            epochs=2, bs=16, min_per_class=8, seed=seed, train=.45, valid=.2, calibration='none')
        valid, test = (run.predictions[run.predictions.split==k] for k in ('valid', 'test'))
        print(f'seed {seed}: {len(valid)} validation and {len(test)} test images, {test.target.mean():.2f} positive')
        for rule in (None, TemperatureScaling(), PlattScaling()):
            p = (test.score if rule is None else rule.fit(valid.target, valid.score,
                valid.patient_id)(test.score))
            c = calibration_ci(test.target, p, test.patient_id)
            print(f"{'as they come' if rule is None else rule.kind}: ECE {c.value['ece']:.3f} ({c.low['ece']:.3f} to "
                f"{c.high['ece']:.3f}), Brier {c.value['brier']:.3f}, mean probability {np.mean(p):.3f}, "
                f"AUROC {auroc(test.target, p):.3f}", flush=True)
    balanced_heads(store, labels)


def balanced_heads(store, labels):
    """The same of a head trained to the end on classes of equal weight, on frozen features, over ten
    divisions of the patients."""
    t = labels.assign(image_id=labels.path.map(dict(zip(store.index.path, store.index.image_id))))
    batches = stored_batches(store, [store.position(i) for i in t.image_id], show=False)
    x = run_model(create_model(ARCH, 2, weights=WEIGHTS), batches, ('features',))['features'].numpy()
    found = {}
    for seed in range(10):
        split = patient_split(t, {'train': .45, 'valid': .2, 'test': .35}, 'kl4', seed=seed).split.to_numpy()
        z = (x-x[split=='train'].mean(0))/(x[split=='train'].std(0)+1e-6)
        head = LogisticRegression(C=1e-3, class_weight='balanced', max_iter=500).fit(z[split=='train'],
            t.kl4[split=='train'])
        (yv, pv, gv), (yt, pt, _) = ((t.kl4[split==k], head.predict_proba(z[split==k])[:, 1],
            t.patient_id[split==k])
            for k in ('valid', 'test'))
        for rule in (None, TemperatureScaling(), PlattScaling()):
            p = pt if rule is None else rule.fit(yv, pv, gv)(pt)
            c = calibration_of(yt, p)
            found.setdefault('as they come' if rule is None else rule.kind,
                []).append((c.ece, c.brier, p.mean()))
    for name, rows in found.items():
        ece, brier, mean = np.mean(rows, 0)
        each = [r[0] for r in rows]
        print(f'balanced heads, {name}: ECE {ece:.3f} ({min(each):.3f} to {max(each):.3f} over 10 divisions), '
            f'Brier {brier:.3f}, '
            f'mean probability {mean:.3f}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('run', 'table', 'look', 'calibration'))
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--data', nargs='+', default=['knee', 'chest'])
    parser.add_argument('--sizes', nargs='+', type=int, default=[112, 160, 224])
    parser.add_argument('--arms', nargs='+', default=['random', 'probe', 'two-phase', 'layer-wise',
        'resnet18'])
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    {'run': run, 'table': table, 'look': look, 'calibration': calibration}[args.what](args)


if __name__=='__main__': main()
