"""Few labels: MixMatch, FixMatch and their relatives beside the same network trained on the labels alone,
with the same augmentation and the same number of steps.

    python benchmarks/semi.py digits [--seeds 5] [--methods fixmatch mixmatch ...]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/semi.py chest [--task two|three] [--seeds 5]
        [--patients fixed|drawn] [--cache FOLDER]
    python benchmarks/semi.py step

digits: scikit-learn's digits, 4 labels a class, a small convolutional network; the error on a held-out third.
        Each seed has other labelled images, weights, batches and draws.
chest:  paediatric chests (Kermany 2018) at 64 px, patients apart; normal or pneumonia with 5 labels a class
        (AUROC), normal, bacterial or viral with 20 (macro AUROC). With `--patients drawn` each seed also
        parts the patients that are not tested on anew; the test patients stay out of `--split valid`.
        mixmatch is that of the paper, mixstrong the callback's default.
        Differences are paired over the seeds, with the intervals of `seeds.py`: Student's, the variance of the
        test images or patients added, p corrected for all comparisons that are printed.
step:   a training step with a method, as a ratio to a bare loop of the forward and backward passes that its
        arithmetic needs.
"""
import argparse
import hashlib
import json
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from seeds import compared, over_seeds, shared_variance
from sklearn.datasets import load_digits
from torch import nn

from radiology_ai.core import rng
from radiology_ai.data.load import xray_dataloaders, xray_test_dl
from radiology_ai.data.split import patient_split
from radiology_ai.metrics.ranking import auroc
from radiology_ai.models.backbone import XrayModel, create_model
from radiology_ai.semi.fixmatch import FixMatch, FlexMatch, FreeMatch, MeanTeacher, SoftMatch
from radiology_ai.semi.load import semi_dataloaders
from radiology_ai.semi.mixmatch import MixMatch
from radiology_ai.semi.step import gentle, harsh
from radiology_ai.train.learner import predict_logits, predict_probabilities, xray_learner


class Store:
    "Images in memory with an index."
    def __init__(self, x): self.x,self.index = x,pd.DataFrame({'image_id': [f'im{i}' for i in range(len(x))]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def spread(values) -> float:
    "Standard deviation over seeds, 0 of one."
    return float(np.std(values, ddof=1)) if len(values)>1 else 0.


def small(n_out: int, seed: int, width: int=32) -> XrayModel:
    "A convolutional network for 8 x 8 pixels."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        body = nn.Sequential(*block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2*width),
            *block(2*width, 2*width))
        return XrayModel(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(2*width, n_out)), {})


def fit(dls, model, steps: int, seed: int, cb=None, *, lr: float=3e-3, wd: float=.05, ema: float=.99):
    "Train for `steps` batches; the average of the weights is kept."
    learn = xray_learner(dls, model, pretrained=False, lr=lr, wd=wd, seed=seed, monitor=None, ema=ema,
        metrics=[], cbs=[] if cb is None else [cb])
    epochs = max(1, round(steps/len(dls.train)))
    with learn.no_logging(): learn.fit_two_phase(epochs, schedule='flat_cos')
    return learn


def comparisons(pairs: list, figure, patients) -> dict:
    """name: text of each pair (a, b) of methods, a minus b; `figure(method, rows)` gives the figure of each seed (S,) on
    these test rows. `patients` are those of the rows, None where each seed is tested on its own."""
    gains,every = {},slice(None) if patients is None else np.arange(len(patients))
    for a,b in pairs:
        def difference(rows, a=a, b=b): return figure(a, rows)-figure(b, rows)
        shared = 0. if patients is None else shared_variance(difference, patients, 400)
        gains[f'{a} minus {b}'] = over_seeds(difference(every), shared,
            0 if patients is None else len(np.unique(patients)))
    return compared(gains)


# ---------------------------------------------------------------- digits

def digits_data(seed: int, per_class: int=4):
    "A store and a manifest: a third is held out, `per_class` of each digit are labelled."
    x,y = load_digits(return_X_y=True)
    order = rng(0, 'held out').permutation(len(x))
    x,y = (x[order].reshape(-1, 8, 8)/16*255).astype(np.uint8),y[order]
    held = np.arange(len(x))>=len(x)*2//3
    t = pd.DataFrame(dict(image_id=[f'im{i}' for i in range(len(x))],
        patient_id=[f'p{i}' for i in range(len(x))], split=np.where(held, 'valid', 'train'), truth=y))
    place = rng(seed, 'labelled').permutation(len(x))
    rank = t.assign(place=place)[~held].groupby('truth').place.rank()
    return Store(x),t.assign(digit=np.where(held | (rank.reindex(t.index)<=per_class), y, np.nan))

def digit_views():
    "Shifts, small turns and zooms; the strong one with shear, exposure and blanked rectangles too."
    weak = gentle(rotation=8, translation=.1, scale=(.95, 1.05))
    strong = harsh(rotation=20, translation=.15, scale=(.8, 1.2), shear=15, crop=None, perspective=0,
        elastic=0, salt=0, collimate=0, marker=0, noise=.1, blur=0, brightness=.2, erase=.6, n_ops=4)
    return weak,strong

DIGITS = {
    'supervised': None,
    'harsh':      None, # labels alone, with the strong views
    'fixmatch':   lambda w, s: FixMatch(weak=w, strong=s),
    'mixmatch':   lambda w, s: MixMatch(weak=w, strong='weak', lambda_u=25., ramp=.4),
    'mixstrong':  lambda w, s: MixMatch(weak=w, strong=s),
    'flexmatch':  lambda w, s: FlexMatch(weak=w, strong=s),
    'freematch':  lambda w, s: FreeMatch(.98, weak=w, strong=s),
    'softmatch':  lambda w, s: SoftMatch(.98, weak=w, strong=s),
    'aligned':    lambda w, s: FixMatch(weak=w, strong=s, align='uniform'),
    'uda':        lambda w, s: FixMatch(tau=.8, weak=w, strong=s, temperature=.4),
    'meanteacher':lambda w, s: MeanTeacher(weak=w, strong=s),
}

def digit_run(name: str, seed: int, args) -> tuple[np.ndarray, float]:
    "Which images of the held-out third are called wrong, seconds."
    store,t = digits_data(seed)
    weak,strong = digit_views()
    start = time.perf_counter()
    if DIGITS[name] is None:
        known = t.dropna(subset=['digit'])
        dls = xray_dataloaders(store, known, 'digit', bs=16,
            sampler=Endless(int((known.split=='train').sum()), 16, args.epoch, seed),
            batch_tfms=[weak if name=='supervised' else strong], seed=seed, device='cpu')
        learn = fit(dls, small(10, seed), args.steps, seed, lr=args.lr)
    else:
        dls = semi_dataloaders(store, t, 'digit', bs=16, mu=1 if name.startswith('mix') else args.mu,
            n_batches=args.epoch, seed=seed, device='cpu')
        learn = fit(dls, small(10, seed), args.steps, seed, DIGITS[name](weak, strong), lr=args.lr)
    p,y = predict_logits(learn, dls.valid)
    return np.asarray(p.argmax(1)!=y),time.perf_counter()-start

class Endless:
    """Batches of a few labelled rows, `n_batches` an epoch: as many steps as a semi-supervised epoch has,
    over the labels alone."""
    def __init__(self, n: int, bs: int, n_batches: int, seed: int):
        self.n,self.bs,self.n_batches = n,bs,n_batches
        self.seed,self.epoch = seed,0
    def __len__(self): return self.n_batches
    def set_epoch(self, epoch: int):
        self.epoch = int(epoch)
        return self
    def __iter__(self):
        gen,need = rng(self.seed, 'endless', self.epoch),self.n_batches*self.bs
        rows = np.concatenate([gen.permutation(self.n) for _ in range(-(-need//self.n))])[:need]
        yield from rows.reshape(self.n_batches, self.bs).tolist()

def digits(args):
    names = ['supervised', *(n for n in (args.methods or list(DIGITS)) if n!='supervised')]
    errors = {n: [] for n in names}
    for seed in range(args.first, args.first+args.seeds):
        for n in names:
            e,s = digit_run(n, seed, args)
            errors[n].append(e)
            print(f'seed {seed} {n:12s} error {e.mean():.4f}   {s:.0f} s', flush=True)
    base = np.mean(errors['supervised'])
    print(f'digits: 40 labels of {(digits_data(0)[1].split=="train").sum()} images, {args.steps} steps, '
        f'{args.seeds} seeds; error on the held-out third')
    for n in names:
        e = np.mean(errors[n], 1)
        print(f'  {n:12s} {e.mean():.4f} (sd {spread(e):.4f}; {e.min():.4f} to {e.max():.4f})  '
            f'{e.mean()/base:.2f} of supervised  each ' + ' '.join(f'{a:.3f}' for a in e), flush=True)
    if args.seeds<2: return
    for name,text in comparisons([(n, 'supervised') for n in names[1:]],
            lambda n, rows: np.mean(np.array(errors[n])[:,rows], 1),
            np.arange(len(errors['supervised'][0]))).items():
        print(f'  {name}: {text}', flush=True)


# ---------------------------------------------------------------- chest

def chest_table(task: str, seed: int|None=None) -> tuple[pd.DataFrame, list]:
    """Images with patient, split and the true class `truth`; the classes. A `seed` parts the patients that are
    not tested on anew."""
    t = pd.read_csv(Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_child'/'manifest.csv')
    names = t.labels.str.replace('_pneumonia', '')
    truth = names.where(names=='normal', 'pneumonia') if task=='two' else names
    t = t.assign(patient_id=t.patient_group.astype(str), truth=truth, kind=names)
    t = patient_split(t[['path', 'patient_id', 'truth', 'kind']], {'train': .55, 'valid': .15, 'test': .3},
        'kind', seed=0)
    if seed is not None:
        rest = patient_split(t[t.split!='test'].drop(columns='split'), {'train': .75, 'valid': .25}, 'kind',
            seed=seed)
        t.loc[rest.index, 'split'] = rest.split
    return t, sorted(truth.unique())

def chest_store(folder: Path, size: int):
    "The images at `size` px, preprocessed once."
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.preprocess.scale import preprocess_folder
    from radiology_ai.preprocess.store import ImageStore
    path = folder/f'chest{size}'
    if not path.exists():
        preprocess_folder(Path(os.environ['RADIOLOGY_AI_REAL_DATA'])/'chest_child'/'images', path,
            recipe('chest', size=size), show=False)
    return ImageStore(path)

def chest_manifest(store, task: str, seed: int, per_class: int, drawn: bool=False):
    "The manifest with `per_class` labels of each class, of different patients, and the classes."
    t,vocab = chest_table(task, seed if drawn else None)
    ids = dict(zip(store.index.path.map(lambda p: Path(p).name), store.index.image_id))
    t = t.assign(image_id=t.path.map(lambda p: ids[Path(p).name]))
    place = pd.Series(rng(seed, 'labelled').permutation(len(t)), t.index)
    train = t.assign(place=place)[t.split=='train'].sort_values('place').drop_duplicates(['patient_id',
        'truth'])
    chosen = train.groupby('truth').head(per_class).index
    return t.assign(y=t.truth.where((t.split!='train') | t.index.isin(chosen)).astype(object)),vocab

WIDTH = dict(channels=(16, 32, 64, 128), stem_width=16)
CHEST = {
    'supervised': None,
    'harsh':     None, # labels alone, with the strong views
    'fixmatch':  lambda a: FixMatch(a.tau, a.lambda_u or 1., ramp=a.ramp, truth='truth',
    strong=harsh(a.level)),
    'mixmatch':  lambda a: MixMatch(lambda_u=a.lambda_u or 25., ramp=.4, truth='truth', strong='weak',
    weak=harsh(a.mix_level) if a.mix_level else None),
    'mixaligned': lambda a: MixMatch(lambda_u=a.lambda_u or 25., ramp=.4, truth='truth', strong='weak',
    align='labels'),
    'mixstrong': lambda a: MixMatch(**(dict(lambda_u=a.lambda_u) if a.lambda_u else {}), truth='truth',
    strong=harsh(a.level)), # the callback's defaults
    'freematch': lambda a: FreeMatch(.98, lambda_u=a.lambda_u or 1., ramp=a.ramp, truth='truth',
    strong=harsh(a.level)),
    'flexmatch': lambda a: FlexMatch(a.tau, lambda_u=a.lambda_u or 1., ramp=a.ramp, truth='truth',
    strong=harsh(a.level)),
    'softmatch': lambda a: SoftMatch(.98, lambda_u=a.lambda_u or 1., ramp=a.ramp, truth='truth',
    strong=harsh(a.level)),
    'aligned':   lambda a: FixMatch(a.tau, a.lambda_u or 1., ramp=a.ramp, truth='truth',
    strong=harsh(a.level), align='labels'),
    'meanteacher': lambda a: MeanTeacher(lambda_u=a.lambda_u or 10., truth='truth', strong=harsh(a.level)),
}

def chest_run(name: str, seed: int, store, args):
    "(N, C) probabilities of the rows of `args.split`, and the run's curves."
    t,vocab = chest_manifest(store, args.task, seed, args.per_class or (5 if args.task=='two' else 20),
        args.patients=='drawn')
    if CHEST[name] is None:
        known = t.dropna(subset=['y'])
        n = int((known.split=='train').sum())
        dls = xray_dataloaders(store, known, 'y', bs=args.bs, sampler=Endless(n, args.bs, args.epoch, seed),
            batch_tfms=[gentle() if name=='supervised' else harsh(args.level)], seed=seed, device='cpu')
    else:
        dls = semi_dataloaders(store, t, 'y', bs=args.bs,
            mu=args.mix_mu if name.startswith('mix') else args.mu, n_batches=args.epoch, seed=seed,
            device='cpu')
    model = create_model('resnet10t', len(vocab), pretrained=False, batchnorm=False, seed=seed, **WIDTH)
    learn = fit(dls, model, args.steps, seed, None if CHEST[name] is None else CHEST[name](args),
        lr=args.lr, wd=args.wd, ema=args.ema)
    return predict_probabilities(learn, xray_test_dl(dls, t[t.split==args.split]))[0],learn.history

def macro(truth, p, vocab) -> float:
    "AUROC, or the mean of each class against the rest."
    if len(vocab)==2: return auroc((truth==vocab[1]).astype(float), p[:,1])
    return float(np.mean([auroc((truth==v).astype(float), p[:,k]) for k,v in enumerate(vocab)]))

UNUSED = {**dict.fromkeys(('mixmatch', 'mixaligned'), ('mu', 'tau', 'level', 'ramp')),
    'mixstrong': ('mu', 'tau', 'ramp', 'mix_level'),
    **dict.fromkeys(('supervised', 'harsh'), ('mu', 'mix_mu', 'mix_level', 'tau', 'lambda_u', 'ramp'))}

def run_key(name: str, args) -> str:
    "A hash of the settings that a run depends on."
    drop = ('what', 'methods', 'seeds', 'first', 'cache', *UNUSED.get(name, ('mix_mu', 'mix_level')))
    return hashlib.sha256(json.dumps({k: v for k,v in vars(args).items() if k not in drop},
        sort_keys=True).encode()).hexdigest()[:8]

def chest(args):
    folder = Path(args.cache)
    folder.mkdir(parents=True, exist_ok=True)
    store = chest_store(folder, args.size)
    names = ['supervised', *(n for n in args.methods or ('fixmatch', 'mixmatch', 'mixstrong')
        if n!='supervised')]
    each,scores,tested = {n: [] for n in names},{n: [] for n in names},[]
    for seed in range(args.first, args.first+args.seeds):
        t,vocab = chest_table(args.task, seed if args.patients=='drawn' else None)
        rows = t[t.split==args.split]
        tested.append(rows)
        for n in names:
            path = folder/f"{args.task}-{n}-{seed}-{run_key(n, args)}.npy"
            start = time.perf_counter()
            if not path.exists():
                p,history = chest_run(n, seed, store, args)
                np.save(path, p)
                for h in history[:: max(1, len(history)//5)]:
                    print('      ', {k: v for k,v in h.items() if k not in ('phase',)}, flush=True)
            scores[n].append(np.load(path))
            each[n].append(macro(rows.truth.to_numpy(), scores[n][-1], vocab))
            print(f'{args.task} seed {seed} {n:12s} AUROC {each[n][-1]:.4f}   '
                f'{time.perf_counter()-start:.0f} s', flush=True)
    print(f'chest, {", ".join(vocab)}: {args.per_class or (5 if args.task=="two" else 20)} labels a class, '
        f'{args.steps} steps, {args.size} px, {args.seeds} seeds from {args.first}, patients {args.patients}, '
        f'{len(rows)} {args.split} images of {rows.patient_id.nunique()} patients')
    for n,v in each.items():
        v = np.array(v)
        print(f'  {n:12s} {v.mean():.4f} (sd {spread(v):.4f}; {v.min():.4f} to {v.max():.4f})  each '
            + ' '.join(f'{a:.3f}' for a in v), flush=True)
    if args.seeds<2: return
    same = all(tested[0].index.equals(o.index) for o in tested)
    truth = tested[0].truth.to_numpy()
    def figure(n, rows):
        if not same: return np.array(each[n])
        return np.array([macro(truth[rows], p[rows], vocab) for p in scores[n]])
    pairs = [(n, 'supervised') for n in names[1:]] + [(names[-1], n) for n in names[1:-1]]
    for name,text in comparisons(pairs, figure, tested[0].patient_id.to_numpy() if same else None).items():
        print(f'  {name}: {text}', flush=True)


# ---------------------------------------------------------------- step

# unlabelled images for each labelled one, and of n and u: images with a gradient, and without
STEP = {'fixmatch': (FixMatch, 4., lambda n, u: (n+2*u, 0)),
    'flexmatch': (FlexMatch, 4., lambda n, u: (n+2*u, 0)),
    'freematch': (FreeMatch, 4., lambda n, u: (n+2*u, 0)),
    'softmatch': (SoftMatch, 4., lambda n, u: (n+2*u, 0)),
    'meanteacher': (MeanTeacher, 4., lambda n, u: (n+u, u)),
    'mixmatch': (MixMatch, 1., lambda n, u: (n+2*u, 2*u))}

class StepTimes(Callback):
    "Processor seconds between the ends of training batches."
    order,watches = 99,True
    def __init__(self): self.at = []
    def before_epoch(self): self.at = []
    def after_batch(self):
        if self.training: self.at.append(time.process_time())

def bare(model, graded: int, asked: int, size: int, n: int) -> list:
    """Processor seconds of `n` passes forward and backward over `graded` images, after one forward alone over
    `asked`."""
    model,out = model.train().to(memory_format=torch.channels_last),[]
    x,y = torch.rand(graded+asked, 1, size, size),torch.zeros(graded, dtype=torch.int64)
    for _ in range(n+1):
        start = time.process_time()
        if asked:
            with torch.no_grad(): model(x[graded:])
        for p in model.parameters(): p.grad = None
        nn.functional.cross_entropy(model(x[:graded]), y).backward()
        out.append(time.process_time()-start)
    return out[1:]

def step(args):
    gen,bs = rng(0, 'noise'),8
    x = gen.integers(0, 255, (400, args.size, args.size)).astype(np.uint8)
    t = pd.DataFrame(dict(image_id=[f'im{i}' for i in range(400)], patient_id=[f'p{i}' for i in range(400)],
        split=np.where(np.arange(400)<392, 'train', 'valid'),
        y=np.where((np.arange(400)<20) | (np.arange(400)>=392), np.arange(400)%2, np.nan)))
    print(f'{args.arch}, {args.size} px, {bs} labelled images a batch, one thread; processor time of a step '
        '(reading, views, passes, losses, optimizer, callbacks) over that of the bare passes')
    for name in args.methods or STEP:
        make,mu,images = STEP[name]
        net = lambda: create_model(args.arch, 2, pretrained=False, batchnorm=False)
        graded,asked = images(bs, round(mu*bs))
        times,ratios = StepTimes(),[]
        dls = semi_dataloaders(Store(x), t, 'y', bs=bs, mu=mu, n_batches=args.steps+1, device='cpu')
        learn = xray_learner(dls, net(), pretrained=False, monitor=None, metrics=[],
            cbs=[make(collapse=''), times])
        for _ in range(args.repeats):
            with learn.no_logging(): learn.fit(1)
            ours = np.median(np.diff(times.at))
            theirs = np.median(bare(net(), graded, asked, args.size, args.steps))
            ratios.append(ours/theirs)
        print(f'  {name:12s} {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})   {graded} '
            f'images forward and backward, {asked} forward: {1000*theirs:.0f} ms', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest='what', required=True)
    a = sub.add_parser('digits')
    for name, value in (('seeds', 5), ('first', 0), ('steps', 1000), ('epoch', 100), ('mu', 4)):
        a.add_argument(f'--{name}', type=int, default=value)
    a.add_argument('--lr', type=float, default=3e-3)
    a.add_argument('--methods', nargs='*', choices=list(DIGITS))
    a = sub.add_parser('chest')
    for name, value in (('seeds', 5), ('first', 0), ('steps', 600), ('epoch', 100), ('size', 64), ('bs', 10),
            ('per-class', 0)):
        a.add_argument(f'--{name}', type=int, default=value)
    for name, value in (('mu', 4.), ('mix-mu', 1.), ('mix-level', 0.), ('tau', .95), ('lambda-u', 0.),
            ('ramp', 0.), ('level', 6.), ('lr', 2e-3), ('wd', .05), ('ema', .99)):
        a.add_argument(f'--{name}', type=float, default=value)
    a.add_argument('--task', choices=['two', 'three'], default='two')
    a.add_argument('--split', choices=['valid', 'test'], default='test', help='settings are chosen on valid')
    a.add_argument('--patients', choices=['fixed', 'drawn'], default='fixed',
        help='drawn: parted anew by each seed')
    a.add_argument('--cache', default='/tmp/semi_chest', help='the store and the scores of finished runs')
    a.add_argument('--methods', nargs='*', choices=list(CHEST))
    a = sub.add_parser('step')
    for name, value in (('size', 64), ('steps', 5), ('repeats', 5)):
        a.add_argument(f'--{name}', type=int, default=value)
    a.add_argument('--arch', default='resnet10t')
    a.add_argument('--methods', nargs='*', choices=list(STEP))
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    dict(digits=digits, chest=chest, step=step)[args.what](args)


if __name__=='__main__': main()
