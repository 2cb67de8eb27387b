"""Self-supervised pretraining: what a step costs beside lightly's own example loop, and what it is worth on
real chests with few labels.

    python benchmarks/pretraining.py step [--methods simclr moco ...] [--bs 32] [--size 64] [--rounds 7]
        [--batches 4] [--threads 1]
    RADIOLOGY_AI_REAL_DATA=../shared/data python benchmarks/pretraining.py chest [--methods ...] [--epochs 10]
        [--seeds 5] [--labels 20] [--minutes 40] [--out FILE.csv]

step:   an epoch of `ssl_learner` and of lightly's example loop take turns, with the same network, batch,
        views, heads and losses. `ready`: the views lie ready for both, so that only the step is compared;
        `whole`: ours with its own views, lightly's with its own transform for that method (of grey images, by
        PIL, in the same process). Medians over the rounds, and the ratio within each round.
chest:  a network is pretrained on unlabelled chests (the training patients of chest_child and all of
        chest_nih). Then, for each seed, `labels` images of each class of chest_child (normal, bacterial,
        viral; one image a patient) are drawn, a linear probe is fitted on the frozen features and the network
        is fine-tuned, beside random weights with the same labels, schedule and augmentation. Macro AUROC on
        the test patients. The interval of the difference is over draws of labels and test patients
        (benchmarks/seeds.py), its p corrected for all comparisons of the table. There is one pretraining a method.
"""
import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import seeds
import torch
from fastai.callback.core import Callback

from radiology_ai.core import rng
from radiology_ai.data.load import xray_dataloaders, xray_test_dl
from radiology_ai.data.split import patient_split
from radiology_ai.metrics.classification import macro_auroc
from radiology_ai.models.backbone import create_model
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.preprocess.store import ImageStore
from radiology_ai.pretrain.methods import METHODS
from radiology_ai.pretrain.monitor import embed, linear_probe
from radiology_ai.pretrain.ssl import ssl_learner, task_model
from radiology_ai.pretrain.views import Views, radiograph_views
from radiology_ai.train.learner import predict_probabilities, xray_learner
from radiology_ai.vision.augment import BatchAugment

NARROW = dict(channels=(32, 64, 128, 256)) # half the width of resnet10t
VIT = dict(patch_size=8, embed_dim=192, depth=4, num_heads=3)
CLASSES = ['normal', 'bacterial_pneumonia', 'viral_pneumonia']


def narrow(network: str) -> dict: return NARROW if network=='resnet10t' else {}


# ---- chest

def chest_tables() -> tuple[pd.DataFrame, dict]:
    "One row an image: `file`, `patient_id`, `split`, `kind` (None for chest_nih); and the folders."
    data = Path(os.environ['RADIOLOGY_AI_REAL_DATA'])
    child = pd.read_csv(data/'chest_child'/'manifest.csv')
    child = child.assign(file='child/' + child.path, patient_id='child ' + child.patient_group.astype(str),
        kind=child.labels)
    child = patient_split(child.assign(image_id=child.path)[['image_id', 'file', 'patient_id', 'kind']],
        {'train': .6, 'valid': .1, 'test': .3}, 'kind', seed=0)
    nih = pd.read_csv(data/'chest_nih'/'manifest.csv')
    nih = nih.assign(file='nih/' + nih.path, patient_id='nih ' + nih.patient_id.astype(str), kind=None,
        split='train')
    return pd.concat([child, nih[['file', 'patient_id', 'kind', 'split']]],
        ignore_index=True), dict(child=data/'chest_child', nih=data/'chest_nih')


def chest_store(folder: Path, size: int) -> tuple:
    "The store of all images (made once) and the manifest."
    table, sources = chest_tables()
    if not (folder/f'store{size}'/'index.parquet').exists():
        films = folder/'films'
        films.mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            if not (films/name).exists(): (films/name).symlink_to(source)
        paths = [str(films/f) for f in table.file]
        preprocess_folder(paths, folder/f'store{size}', recipe('chest', size=size), workers=1, show=False)
    store = ImageStore(folder/f'store{size}')
    key = store.index.path.map(lambda p: '/'.join(Path(p).parts[-3:]))
    ids = dict(zip(key, store.index.image_id))
    table = table.assign(image_id=table.file.map(lambda f: ids.get('/'.join(Path(f).parts[-3:]))))
    return store, table[table.image_id.notna()].reset_index(drop=True)


def few(table, n: int, seed: int) -> pd.DataFrame:
    """`n` images of each class from different training patients; the validation part is a formality of the
    loaders."""
    pool = table[(table.split=='train') & table.kind.notna()].sample(frac=1,
        random_state=seed).drop_duplicates('patient_id')
    rows = pd.concat([pool[pool.kind==k].head(n) for k in CLASSES])
    valid = table[(table.split=='valid') & table.kind.notna()].groupby('kind').head(2)
    return pd.concat([rows, valid])


def pretrain(name: str, store, table, args):
    backbone = (dict(backbone='vit_tiny_patch16_224', model_args=dict(img_size=args.size, **VIT))
        if name=='mae' else dict(backbone=args.network, model_args=narrow(args.network)))
    rows = pd.concat([table[table.split=='train'], table[table.split=='valid']])
    learn = ssl_learner(store, rows, method=name, bs=args.bs, seed=0, dls_args=dict(device='cpu'), lr=args.lr,
        **backbone)
    start = time.perf_counter()
    learn.fit_two_phase(args.epochs, head_epochs=0, body_div=1)
    last = learn.history[-1]
    print(f"{name}: pretrained {args.epochs} epochs of {len(learn.dls.train)} batches in "
        f"{time.perf_counter()-start:.0f} s; loss {learn.history[0]['train_loss']:.3f} -> "
        f"{last['train_loss']:.3f}, spread {last['spread']:.2f}, rank {last['rank']:.1f}", flush=True)
    return learn


def judge(name: str, learn, store, table, args) -> list:
    "Scores on the test patients: a dict for each seed."
    test, out = table[(table.split=='test') & table.kind.notna()], []
    for seed in range(args.seeds):
        rows = few(table, args.labels, seed)
        aug = BatchAugment(rotation=10, translation=.06, scale=(.9, 1.1), brightness=.1, contrast=.2,
            gamma=(.8, 1.25), noise=.02, seed=seed)
        dls = xray_dataloaders(store, rows, 'kind', bs=20, batch_tfms=[aug], vocab=CLASSES, seed=seed,
            device='cpu')
        fresh = dict(img_size=args.size, **VIT) if name=='random vit' else narrow(args.network)
        model = (task_model(learn, dls, seed=seed) if learn is not None
            else create_model('vit_tiny_patch16_224' if name=='random vit' else args.network, 3,
            pretrained=False, seed=seed, **fresh))
        labelled = rows[rows.split=='train']
        x, y = embed(model, xray_test_dl(store, labelled, labels='kind', vocab=CLASSES, device='cpu'))
        z, truth = embed(model, xray_test_dl(store, test, labels='kind', vocab=CLASSES, device='cpu'))
        probe = linear_probe(x, y, z)
        task = xray_learner(dls, model, pretrained=False, seed=seed, monitor=None, metrics=[],
            lr=args.tune_lr)
        task.fit_two_phase(args.tune_epochs, head_epochs=0, body_div=1)
        tuned = predict_probabilities(task, xray_test_dl(dls, test))[0]
        out.append(dict(probe=probe, tuned=tuned, truth=truth))
    return out


def difference(ours, theirs, how: str, patients, draws: int) -> seeds.Gain:
    "The difference of the mean AUROCs over draws of labels and test patients."
    truth = ours[0]['truth']
    each = lambda rows: np.array([macro_auroc(truth[rows], o[how][rows])
        - macro_auroc(truth[rows], t[how][rows]) for o, t in zip(ours, theirs)])
    return seeds.over_seeds(each(np.arange(len(truth))), seeds.shared_variance(each, patients, draws),
        patients.max()+1)


def chest(args):
    end = time.time() + 60*args.minutes
    store, table = chest_store(Path(args.cache), args.size)
    test = table[(table.split=='test') & table.kind.notna()]
    patients = pd.factorize(test.patient_id)[0]
    print(f"{int((table.split=='train').sum())} images to pretrain on "
        f"({table[table.split=='train'].patient_id.nunique()} patients), {len(test)} to test "
        f"({patients.max()+1} patients), {args.labels} labels a class, {args.seeds} seeds, {args.network}, "
        f"{args.size} px", flush=True)
    base, rows, gains, took = {}, [], {}, 0.
    def record(name, scores, plain):
        for how in ('probe', 'tuned'):
            a = [macro_auroc(s['truth'], s[how]) for s in scores]
            d = seeds.Gain(0, 0, 0, 1, len(a))
            if plain is not None:
                gains[f'{name} {how}'] = d = difference(scores, plain, how, patients, args.draws)
            rows.append(dict(method=name, how=how, auroc=np.mean(a), sd=np.std(a, ddof=1), difference=d.value,
                low=d.low, high=d.high, p=d.p, each=' '.join(f'{v:.3f}' for v in a)))
            print('  {method:8} {how:6} AUROC {auroc:.3f} (sd {sd:.3f})  against random {difference:+.3f} '
                '({low:+.3f} to {high:+.3f})   {each}'.format(**rows[-1]), flush=True)
        if args.out: pd.DataFrame(rows).to_csv(args.out, index=False)
    for name in args.methods:
        start = time.time()
        if start + took > end:
            print(f'{name}: no time left', flush=True)
            continue
        against = 'random vit' if name=='mae' else 'random'
        if against not in base:
            base[against] = judge(against, None, store, table, args)
            record(against, base[against], None)
        learn = pretrain(name, store, table, args)
        record(name, judge(name, learn, store, table, args), base[against])
        took = time.time()-start
    for name, text in seeds.compared(gains).items(): print(f'{name}: {text}')


# ---- step

class Ready:
    "Views that were made before."
    def __init__(self, made, n_small): self.made,self.n,self.n_small = made,2,n_small
    def __call__(self, x, k, partners=None): return self.made
    def __repr__(self): return 'Ready'


def example(name: str, body, n: int, s: dict) -> tuple:
    "(modules, step(views) -> loss) as in lightly's examples for PyTorch, with the settings `s`."
    import copy

    import lightly.loss as losses
    import lightly.models.modules as parts
    import lightly.models.utils as utils
    f = lambda x, net=body: net(x).mean((2, 3))
    if name=='mae': return example_mae(body, s, parts, utils)
    if name in ('swav', 'dino'):
        return example_crops(name, body, n, s, parts, utils=utils, losses=losses, f=f)
    head = getattr(parts, METHODS[name].projector)(n, s['hidden'], s['dim'])
    if name in ('simclr', 'barlow', 'vicreg'):
        loss = dict(simclr=losses.NTXentLoss, barlow=losses.BarlowTwinsLoss, vicreg=losses.VICRegLoss)[name]()
        return [body, head], lambda v: loss(head(f(v[0])), head(f(v[1])))
    if name=='simsiam':
        guess = parts.SimSiamPredictionHead(s['dim'], s['predictor'], s['dim'])
        loss = losses.NegativeCosineSimilarity()
        def step(v):
            z = [head(f(x)) for x in v]
            return .5*(loss(guess(z[0]), z[1].detach()) + loss(guess(z[1]), z[0].detach()))
        return [body, head, guess], step
    body_m, head_m = copy.deepcopy(body).requires_grad_(False), copy.deepcopy(head).requires_grad_(False)
    def follow():
        utils.update_momentum(body, body_m, .99)
        utils.update_momentum(head, head_m, .99)
    def ask(x):
        with torch.no_grad(): return head_m(f(x, body_m))
    if name=='moco':
        loss = losses.NTXentLoss(s['temperature'], memory_bank_size=(s['queue'], s['dim']))
        def step(v):
            follow()
            return loss(head(f(v[0])), ask(v[1]))
        return [body, head], step
    guess = parts.BYOLPredictionHead(s['dim'], s['predictor'], s['dim'])
    loss = losses.NegativeCosineSimilarity()
    def step(v):
        follow()
        return .5*(loss(guess(head(f(v[0]))), ask(v[1])) + loss(guess(head(f(v[1]))), ask(v[0])))
    return [body, head, guess], step


def example_crops(name, body, n, s, parts, *, utils, losses, f):
    "The same for the methods with small crops."
    import copy
    if name=='swav':
        head = parts.SwaVProjectionHead(n, s['hidden'], s['dim'])
        prototypes = parts.SwaVPrototypes(s['dim'], s['prototypes'])
        loss = losses.SwaVLoss()
        def step(v):
            prototypes.normalize()
            out = [prototypes(torch.nn.functional.normalize(head(f(x)), dim=1)) for x in v]
            return loss(out[:2], out[2:])
        return [body, head, prototypes], step
    head = parts.DINOProjectionHead(n, s['hidden'], s['dim'], s['prototypes'])
    body_m = copy.deepcopy(body).requires_grad_(False)
    head_m = parts.DINOProjectionHead(n, s['hidden'], s['dim'], s['prototypes']).requires_grad_(False)
    loss = losses.DINOLoss(s['prototypes'])
    head_m.load_state_dict(head.state_dict())
    def step(v):
        utils.update_momentum(body, body_m, .996)
        utils.update_momentum(head, head_m, .996)
        with torch.no_grad(): teacher = [head_m(f(x, body_m)) for x in v[:2]]
        return loss(teacher, [head(f(x)) for x in v], epoch=0)
    return [body, head], step


def example_mae(body, s, parts, utils):
    "The same for the masked autoencoder."
    vit = parts.MaskedVisionTransformerTIMM(body.net, weight_initialization='skip',
        pos_embed_initialization='skip')
    net = body.net
    patch, n = net.patch_embed.patch_size[0], vit.sequence_length
    decoder = parts.MaskedVisionTransformerDecoderTIMM(n-1, s['width'], s['depth'], s['heads'])
    enter = torch.nn.Linear(net.embed_dim, s['width'])
    draw = torch.nn.Linear(s['width'], patch**2)
    loss = torch.nn.MSELoss()
    def step(v):
        x = v[0]
        keep, mask = utils.random_token_mask((len(x), n), s['share'], device=x.device)
        seen = enter(vit.encode(x, idx_keep=keep))
        whole = utils.set_at_index(utils.repeat_token(decoder.mask_token, (len(x), n)), keep, seen)
        return loss(draw(utils.get_at_index(decoder(whole), mask)),
            utils.get_at_index(utils.patchify(x, patch), mask-1))
    return [vit, decoder, enter, draw], step


def transform(name: str, size: int, side: int, n_small: int):
    "lightly's transform for the method, without the normalisation of colours."
    import lightly.transforms as t
    if name=='mae': return t.MAETransform(input_size=size, normalize=None)
    if name=='swav': return t.SwaVTransform(crop_sizes=(size, side), crop_counts=(2, n_small), normalize=None)
    if name=='dino':
        return t.DINOTransform(global_crop_size=size, local_crop_size=side, n_local_views=n_small,
            normalize=None)
    if name in ('byol', 'barlow'):
        return t.BYOLTransform(t.BYOLView1Transform(input_size=size, normalize=None),
            t.BYOLView2Transform(input_size=size, normalize=None))
    return dict(simclr=t.SimCLRTransform, moco=t.MoCoV2Transform, simsiam=t.SimSiamTransform,
        vicreg=t.VICRegTransform)[name](input_size=size, normalize=None)


class Films(torch.utils.data.Dataset):
    "The films as lightly's examples read them: PIL images and a transform for each."
    def __init__(self, store, n, change): self.store,self.n,self.change = store,n,change
    def __len__(self): return self.n
    def __getitem__(self, i):
        from PIL import Image
        return self.change(Image.fromarray(np.asarray(self.store[i%len(self.store)])))


class Clock(Callback):
    "Seconds of processor time of the training part of each epoch."
    order = -200
    def __init__(self): self.taken = []
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.taken.append(time.process_time() - self.start)


class Memory:
    "Simulated chests in memory."
    def __init__(self, size, n=32):
        self.x = np.stack([np.rint(255*expose(simulate_chest(k, size=size), rng(k)).pixels).astype(np.uint8)
            for k in range(n)])
        self.index = pd.DataFrame({'image_id': [f'im{k}' for k in range(n)]})
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]


def step(args):
    store = Memory(args.size)
    rows = args.bs*args.batches
    manifest = pd.DataFrame(dict(image_id=[f'im{k%len(store)}' for k in range(rows+2)],
        patient_id=[f'p{k}' for k in range(rows+2)], split=['train']*rows+['valid']*2))
    print(f'{args.network}, {args.size} px, batches of {args.bs}, processor seconds a step, median of '
        f'{args.rounds} rounds; ratio: median (lowest to highest)')
    for name in args.methods:
        for how in ('ready', 'whole'): print(compare_steps(name, how, store, manifest, args), flush=True)


def compare_steps(name, how, store, manifest, args) -> str:
    backbone = (dict(backbone='vit_tiny_patch16_224', model_args=dict(img_size=args.size, **VIT))
        if name=='mae' else dict(backbone=args.network))
    m = METHODS[name]
    views = Views(1, big=radiograph_views(crop=(.4, 1.))) if name=='mae' else Views(2, m.small)
    with torch.no_grad():
        made = views(torch.from_numpy(store.x[np.arange(args.bs)%len(store)]).float()[:,None]/255, 0)
    clock = Clock()
    learn = ssl_learner(store, manifest, method=name, bs=args.bs, cbs=[clock],
        views=Ready(made, views.n_small) if how=='ready' else views,
        dls_args=dict(device='cpu', check_leakage=False), collapse=None, **backbone)
    body = create_model(backbone['backbone'], 1, pretrained=False, **backbone.get('model_args', {})).body
    modules, f = example(name, body, body.n_features, learn.self_supervised.settings)
    opt = torch.optim.AdamW([p for mod in modules for p in mod.parameters() if p.requires_grad], lr=1e-3)
    films = torch.utils.data.DataLoader(Films(store, args.bs*args.batches,
        transform(name, args.size, made[-1].shape[-1], views.n_small)), args.bs, shuffle=True)
    def theirs():
        start = time.process_time()
        for b in (learn.dls.train if how=='ready' else films):
            f(made if how=='ready' else b).backward()
            opt.step()
            opt.zero_grad()
        return time.process_time()-start
    took = []
    learn.create_opt()
    for _ in range(args.rounds+1):
        learn.fit(1)
        took.append((clock.taken[-1], theirs()))
    ours, their = np.array(took[1:]).T/args.batches
    r = ours/their
    return (f'{name:8} {how}: ours {np.median(ours):.3f}  lightly {np.median(their):.3f}  '
        f'ratio {np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest='what', required=True)
    c, s = sub.add_parser('chest'), sub.add_parser('step')
    for p, methods in ((c, ['simclr', 'byol', 'vicreg', 'moco', 'barlow', 'simsiam', 'swav', 'dino', 'mae']),
            (s, list(METHODS))):
        p.add_argument('--methods', nargs='+', default=methods, choices=list(METHODS))
        p.add_argument('--network', default='resnet10t')
        p.add_argument('--size', type=int, default=64)
        p.add_argument('--threads', type=int, default=1)
    for name, value in (('bs', 32), ('epochs', 10), ('seeds', 5), ('labels', 20), ('tune_epochs', 25),
            ('draws', 300), ('minutes', 40)):
        c.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in (('lr', 1e-3), ('tune_lr', 1e-3)):
        c.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    c.add_argument('--cache', default='/tmp/radiology_ai_ssl'); c.add_argument('--out')
    for name, value in (('bs', 32), ('rounds', 7), ('batches', 4)):
        s.add_argument(f'--{name}', type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads)
    chest(args) if args.what=='chest' else step(args)


if __name__=='__main__': main()
