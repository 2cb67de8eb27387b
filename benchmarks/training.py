"""What the training loop costs beside a bare PyTorch loop, and whether loading and augmenting keep up with a network.

    python benchmarks/training.py [overhead] [loading] [--rounds 7] [--batches 12] [--bs 16] [--threads 2] [--device cpu]

overhead: epochs of `xray_learner` (schedule, seeds, checks, recorder, best epoch; and once more with average, clipping and a
          checkpoint in each epoch) and of a bare loop take turns: the same loader, resnet18 at
          128 px, weights, AdamW in the same groups. Seconds a batch, medians over the rounds, and their ratio within each round.
loading:  images a second from an `ImageStore` through `BatchAugment` (its defaults) at 224 px, beside resnet18 training at 224 px on the
          same device; and the share of a training in which the network waits for its batch.
"""
import argparse
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback

from radiology_ai.core import rng
from radiology_ai.data.load import xray_dataloaders
from radiology_ai.phantom.chest import simulate_chest
from radiology_ai.phantom.xray import expose
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.preprocess.scale import preprocess_folder
from radiology_ai.train.learner import xray_learner
from radiology_ai.vision.augment import BatchAugment


def made_store(folder: Path, size: int, films: int=16):
    "A store of simulated chests."
    source = folder/f'films{size}'
    source.mkdir()
    for k in range(films):
        cv2.imwrite(str(source/f'{k}.png'), np.rint(255*expose(simulate_chest(k, size=size+32),
            rng(k)).pixels).astype(np.uint8))
    return preprocess_folder(source, folder/f'store{size}', recipe('chest', size=size), workers=1, show=False)


def loaders(store, n: int, bs: int, device: str, augment: bool=True):
    "`n` training batches an epoch and one for validation, of the images in turn."
    rows = (n+1)*bs
    ids = [store.index.image_id[k%len(store)] for k in range(rows)]
    manifest = pd.DataFrame(dict(image_id=ids, patient_id=[f'p{k}' for k in range(rows)],
        label=np.arange(rows)%2, split=['train']*(n*bs)+['valid']*bs))
    return xray_dataloaders(store, manifest, 'label', bs=bs, sampler=None,
        batch_tfms=[BatchAugment()] if augment else None, device=device, check_leakage=False)


class Clock(Callback):
    "Seconds of the training part of each epoch."
    order = -200
    def __init__(self): self.taken = []
    def before_train(self): wait(self.learn.dls.device); self.start = time.perf_counter()
    def after_train(self): wait(self.learn.dls.device); self.taken.append(time.perf_counter() - self.start)


def wait(device):
    if torch.device(device).type=='cuda': torch.cuda.synchronize()


def bare_epoch(dl, model, loss_func, opt) -> float:
    "Seconds of an epoch as one would write it by hand."
    model.train()
    wait(dl.device)
    start = time.perf_counter()
    for x,y in dl:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    wait(dl.device)
    return time.perf_counter() - start


def by_hand(learn):
    "A copy of the Learner's network with torch's AdamW over the same groups."
    import copy
    model = copy.deepcopy(learn.model).to(learn.dls.device, memory_format=torch.channels_last)
    groups = [dict(params=[p for p in part.parameters() if (p.ndim>1)==decays], weight_decay=learn.wd*decays)
        for part in (model.body, model.head) for decays in (True, False)]
    return model,torch.optim.AdamW(groups, lr=1e-3, betas=(.9, .99), eps=1e-5)


def bench_overhead(args, folder):
    dls = loaders(made_store(folder, 128), args.batches, args.bs, args.device)
    plain,full = Clock(),Clock()
    learn = xray_learner(dls, 'resnet18', pretrained=False, cbs=[plain])
    model,opt = by_hand(learn)
    rich = xray_learner(dls, 'resnet18', pretrained=False, cbs=[full], ema=.999, clip=1.)
    hand = []
    for k in range(args.rounds + 1):
        hand.append(bare_epoch(dls.train, model, learn.loss_func, opt))
        learn.fit_two_phase(1)
        rich.fit_two_phase(1, checkpoint=folder/f'run{k}')
    print(f"resnet18, 128 px, {args.bs} images a batch, {args.batches} batches an epoch, {args.rounds} "
        f"rounds on {args.device}, {torch.get_num_threads()} threads")
    per = lambda t: np.array(t[1:])/args.batches # the first round warms up
    for name,t in (('bare loop', hand), ('xray_learner', plain.taken),
            ('... with average and clipping', full.taken)):
        print(f"{name:32s} {1e3*np.median(per(t)):8.2f} ms a batch   overhead {100*(np.median(per(t)/per(hand))-1):+5.1f} %")
    own = loop_alone(args, dls)
    print(f"{'the loop alone (tiny network)':32s} {1e3*own:8.2f} ms a batch more than the bare loop, "
        f"{100*own/np.median(per(hand)):.2f} % of a resnet18's batch")


def loop_alone(args, dls) -> float:
    "Seconds a batch that the loop of `xray_learner` costs, seen beside a network that costs nothing."
    from torch import nn
    body = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 8))
    clock,hand = Clock(),[]
    learn = xray_learner(dls, nn.ModuleDict(dict(body=body, head=nn.Linear(8, 2))), cbs=[clock],
        monitor='valid_loss')
    learn.model.forward = lambda x: learn.model.head(learn.model.body(x.as_subclass(torch.Tensor)))
    model,opt = nn.Sequential(body, learn.model.head),torch.optim.AdamW(learn.model.parameters())
    for _ in range(2*args.rounds + 1):
        hand.append(bare_epoch(dls.train, model, learn.loss_func, opt))
        learn.fit_two_phase(1)
    return (np.median(clock.taken[1:]) - np.median(hand[1:]))/args.batches


def bench_loading(args, folder):
    n,bs = 6,32
    store = made_store(folder, 224)
    dls = loaders(store, n, bs, args.device)
    seconds = {'loading': [], 'loading and augmenting': []}
    sets = {'loading': loaders(store, n, bs, args.device, augment=False), 'loading and augmenting': dls}
    learn = xray_learner(dls, 'resnet18', pretrained=False)
    model,opt = by_hand(learn)
    x,y = dls.one_batch()
    model.train()
    train = []
    for _ in range(args.rounds):
        for name,d in sets.items():
            wait(args.device); start = time.perf_counter()
            for _ in d.train: pass
            wait(args.device); seconds[name].append(time.perf_counter()-start)
        wait(args.device); start = time.perf_counter()
        for _ in range(2):
            learn.loss_func(model(x), y).backward(); opt.step(); opt.zero_grad()
        wait(args.device); train.append((time.perf_counter()-start)/2)
    step,rates = np.median(train),{k: n*bs/np.median(v) for k,v in seconds.items()}
    for k,v in rates.items(): print(f"{k:32s} {v:10,.0f} images/s   {v*step/bs:6.1f} x training")
    print(f"{'training resnet18, 224 px':32s} {bs/step:10,.0f} images/s   waits for its batch "
        f"{100/(1 + rates['loading and augmenting']*step/bs):.1f} % of the time, with one process for both")


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=['overhead', 'loading'])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=12)
    parser.add_argument('--bs', type=int, default=16)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as d:
        for part in args.parts: {'overhead': bench_overhead, 'loading': bench_loading}[part](args, Path(d))
