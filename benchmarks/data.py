"""Splitting, sampling and the search for copies, beside what is usually done, in one run on one machine.

    python benchmarks/data.py [split] [sample] [copies] [find] [--images 100000] [--size 224] [--rows 1000000]

split:  patient_split on the labels of ChestX-ray14 (made up in the same shape without
        RADIOLOGY_AI_REAL_DATA) beside the best of 10,000 random divisions by patient.
sample: an epoch's batches over so many rows, as lists, beside torch's samplers; memory over 20 epochs.
copies: thumbnails, fingerprints and near pairs of so many images from a memory map (mixtures of two chests, turned
        and shifted), beside a 64-bit perceptual hash with a search by Hamming distance.
find:   altered copies of real chests hidden among others, and false pairs among 10,000 images (real ones and their
        mirror images): find_copies beside the same hash. Needs RADIOLOGY_AI_REAL_DATA.
"""
import argparse
import os
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.fft import dctn

from radiology_ai.core import rng
from radiology_ai.data.duplicates import find_copies, fingerprints, near_pairs, registered_correlation, thumbnails
from radiology_ai.data.sampler import (
    BalancedBatchSampler,
    PairedBatchSampler,
    PositiveShareSampler,
    RepeatedBatchSampler,
    ShuffledBatchSampler,
    WeightedBatchSampler,
    inverse_frequency,
)
from radiology_ai.data.split import patient_folds, patient_split, split_deviation

DATA = os.environ.get('RADIOLOGY_AI_REAL_DATA')


def seconds(f, times: int=3) -> float:
    "The best of some runs."
    best = float('inf')
    for _ in range(times):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def chest_labels() -> tuple[pd.DataFrame, list]:
    "A manifest of 112,120 images and its 14 labels."
    if not DATA:
        gen = rng(0, 'labels')
        df = pd.DataFrame({'patient_id': (30_805*gen.random(112_120)**2).astype(int),
            **{f'label{k}': (gen.random(112_120)<.18*.75**k).astype(float) for k in range(14)}})
        return df.assign(image_id=df.index.astype(str)),[c for c in df if c.startswith('label')]
    rows = pd.read_csv(Path(DATA)/'labels/nih/Data_Entry_2017_v2020.csv.gz').rename(
        columns={'Image Index': 'image_id', 'Patient ID': 'patient_id'})
    found = rows['Finding Labels'].str.get_dummies('|').drop(columns='No Finding')
    return pd.concat([rows[['image_id', 'patient_id']], found], axis=1),list(found)


def random_divisions(df, labels, n: int=10_000) -> tuple:
    """The smallest largest and the smallest mean deviation of `n` random divisions, 60 to 20 to 20 % of the
    patients."""
    units,keys = pd.factorize(df.patient_id)
    y = np.stack([np.bincount(units, df[c]) for c in labels] + [np.bincount(units)], 1).astype(np.float32)
    fifth,gen,best = len(keys)//5,rng(0, 'random'),(1., 1.)
    part = np.repeat(np.arange(3), [len(keys)-2*fifth, fifth, fifth])
    for _ in range(n//50):
        which = np.stack([gen.permutation(part) for _ in range(50)])
        sums = np.stack([(which==s).astype(np.float32)@y for s in range(3)], 1)
        gap = np.abs(sums[...,:-1]/sums[...,-1:] - y[:,:-1].sum(0)/y[:,-1].sum())
        best = min(best[0], gap.max((1, 2)).min()),min(best[1], gap.mean((1, 2)).min())
    return best


def bench_split(args):
    df,labels = chest_labels()
    split = patient_split(df, label=labels)
    own,took = split_deviation(split, labels),seconds(lambda: patient_split(df, label=labels))
    start = time.perf_counter()
    best = random_divisions(df, labels)
    chance = time.perf_counter() - start
    print(f"{len(df)} images of {df.patient_id.nunique()} patients, {len(labels)} labels")
    print(f"patient_split                     {took:6.2f} s   largest deviation {own[0]:.1e}   mean {own[1]:.1e}")
    print(f"best of 10,000 random divisions   {chance:6.2f} s   largest deviation {best[0]:.1e}   mean "
        f"{best[1]:.1e}   ratio {best[0]/own[0]:.0f} and {best[1]/own[1]:.0f}, in {chance/took:.0f} times the time")
    print(f"patient_folds, ten                {seconds(lambda: patient_folds(df, 10, labels), 1):6.2f} s")


def bench_sample(args):
    from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler
    n,gen = args.rows,rng(0, 'rows')
    y = (gen.random((n, 14)) < .1*.7**np.arange(14)).astype(float)
    y[gen.random((n, 14))<.05] = np.nan
    half = np.where(gen.random(n)<.9, np.nan, gen.integers(0, 5, n))
    weights = inverse_frequency(y)
    peers = {'torch RandomSampler': BatchSampler(RandomSampler(range(n)), 32, False),
        'torch WeightedRandomSampler': BatchSampler(WeightedRandomSampler(weights, n), 32, False)}
    ours = {'ShuffledBatchSampler': ShuffledBatchSampler(n),
        'WeightedBatchSampler': WeightedBatchSampler(weights),
        'BalancedBatchSampler, 14 labels': BalancedBatchSampler(y),
            'BalancedBatchSampler, rank 1 of 4': BalancedBatchSampler(y, rank=1, world=4),
            'PositiveShareSampler': PositiveShareSampler(y[:,0]),
            'RepeatedBatchSampler': RepeatedBatchSampler(n),
            'PairedBatchSampler, balanced': PairedBatchSampler(half, 16, 7, min_per_class=1)}
    def whole(s): # each batch is let go, as in training
        for _ in s: pass
    times = {k: seconds(partial(whole, s)) for k,s in (peers|ours).items()}
    for k,t in times.items():
        peer = 'torch WeightedRandomSampler' if 'Weighted' in k else 'torch RandomSampler'
        print(f"{k:36s} {t:6.2f} s an epoch of {n} rows, {len((peers|ours)[k])} batches"
            + ('' if k in peers else f"   {times[peer]/t:.1f} times as fast as {peer}"))
    for k,s in ours.items():
        tracemalloc.start()
        held = []
        for e in range(20):
            whole(s.set_epoch(e))
            held.append(tracemalloc.get_traced_memory()[1]/2**20)
            tracemalloc.reset_peak()
        tracemalloc.stop()
        print(f"{k:36s} peak of an epoch {held[1]:.0f} MiB in the second, {held[-1]:.0f} MiB in the "
            f"twentieth: ratio {held[-1]/held[1]:.2f}")


def perceptual_hash(image) -> int:
    "The usual 64 bits: signs of the lowest 8 x 8 frequencies of a 32 x 32 thumbnail against their median."
    low = dctn(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32), norm='ortho')[:8,
        :8].ravel()
    return np.packbits(low>np.median(low)).view(np.uint64)[0]


def hamming_pairs(a, b=None, most: int=4) -> tuple:
    "Pairs of hashes with at most so many different bits, by blocks."
    out,other = [],a if b is None else b
    for i in range(0, len(a), 256):
        for j in range(i if b is None else 0, len(other), 4096):
            r,c = np.nonzero(np.bitwise_count(a[i:i+256,None]^other[None,j:j+4096])<=most)
            keep = r+i<c+j if b is None else r>=0
            out.append(np.stack([r[keep]+i, c[keep]+j]))
    return np.concatenate(out, 1)


def read(folder: str, patient: str) -> tuple[list, list, list]:
    "Images (H, W), names and patients of a set of real radiographs."
    m = pd.read_csv(Path(DATA)/folder/'manifest.csv')
    return [cv2.imread(str(Path(DATA)/folder/p), cv2.IMREAD_GRAYSCALE)
        for p in m.path],list(folder + '/' + m.path),list(folder.removesuffix('_64') + '/'
        + m[patient].astype(str))


def chests(size: int) -> list:
    "Chests to mix others from."
    if DATA:
        images = read('chest_nih', 'patient_id')[0] + read('chest_child',
            'patient_group')[0] + read('chest_covid', 'patient')[0]
    else:
        from radiology_ai.phantom.chest import simulate_chest
        from radiology_ai.phantom.xray import expose
        images = [(expose(simulate_chest(i, size=size),
            rng(i, 'exposure')).radiograph().pixels*255).astype(np.uint8) for i in range(200)]
    return [cv2.resize(a, (size, size), interpolation=cv2.INTER_AREA) for a in images]


def moved(a, gen):
    "`a` turned by up to 12 degrees, scaled and shifted."
    size = a.shape[0]
    m = cv2.getRotationMatrix2D((size/2, size/2), gen.uniform(-12, 12), gen.uniform(.85, 1.2))
    m[:,2] += gen.uniform(-.08, .08, 2)*size
    return cv2.warpAffine(a, m, (size, size), borderMode=cv2.BORDER_REFLECT)


def bench_copies(args):
    n,size,gen,source = args.images,args.size,rng(0, 'mixtures'),chests(args.size)
    with tempfile.TemporaryDirectory() as tmp:
        images = np.lib.format.open_memmap(f'{tmp}/images.npy', 'w+', np.uint8, (n, size, size))
        for k in range(n):
            w = gen.uniform(.35, .65)
            images[k] = cv2.addWeighted(moved(source[gen.integers(len(source))], gen), w,
                moved(source[gen.integers(len(source))], gen), 1-w, 0)
        images.flush()
        start = time.perf_counter(); thumbs = thumbnails(images, show=False)
        read_in = time.perf_counter(); prints = fingerprints(thumbs)
        printed = time.perf_counter(); i,j,_ = near_pairs(prints, show=False)
        end = time.perf_counter()
        own = end - start
        print(f"{n} images of {size} pixels, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
        print(f"thumbnails {read_in-start:.1f} s, fingerprints {printed-read_in:.1f} s, near pairs "
            f"{end-printed:.1f} s: {own:.1f} s; {len(i)} candidates")
        some = gen.permutation(len(i))[:2000]
        each = seconds(lambda: [registered_correlation(thumbs[i[k]], thumbs[j[k]]) for k in some], 1)/max(1,
            len(some))
        print(f"registration {1e3*each:.2f} ms a pair on one thread: {each*len(i):.0f} s for all candidates")
        start = time.perf_counter(); hashes = np.array([perceptual_hash(a) for a in images])
        hashed = time.perf_counter(); pairs = hamming_pairs(hashes)
        peer = time.perf_counter()
        print(f"64-bit hash {hashed-start:.1f} s, search {peer-hashed:.1f} s: {peer-start:.1f} s, "
            f"{(peer-start)/own:.1f} times as long; {pairs.shape[1]} pairs within 4 bits")


def altered(a, gen, how=('crop', 'resize', 'bright', 'jpeg')):
    "A copy of `a` as another hand might have left it."
    h,w = a.shape
    if 'crop' in how:
        t,b,l,r = gen.uniform(0, .02, 4)
        a = a[int(t*h):h-int(b*h), int(l*w):w-int(r*w)]
    if 'resize' in how: a = cv2.resize(a, (int(gen.integers(128, 1025)),)*2, interpolation=cv2.INTER_AREA)
    if 'bright' in how or 'burnt' in how:
        g,c,b = ((gen.uniform(.7, 1.4), gen.uniform(.85, 1.2), 0) if 'bright' in how
            else (gen.uniform(.6, 1.6), gen.uniform(.8, 1.25), gen.uniform(-.1, .1)))
        a = (np.clip((a/255)**g*c + b, 0, 1)*255).round().astype(np.uint8)
    if 'jpeg' in how:
        a = cv2.imdecode(cv2.imencode('.jpg', a, [cv2.IMWRITE_JPEG_QUALITY, int(gen.integers(30, 91))])[1],
            cv2.IMREAD_GRAYSCALE)
    return a


def bench_find(args):
    if not DATA: return print('RADIOLOGY_AI_REAL_DATA is not set: the real radiographs are not here')
    sets = {s: read(s, p) for s,p in (('chest_nih', 'patient_id'), ('chest_child', 'patient_group'),
        ('chest_covid', 'patient'), ('knee_oai', 'patient'), ('chest_nih_64', 'patient_id'))}
    nih,names,owners = sets['chest_nih']
    others = [sum((sets[s][k] for s in ('chest_child', 'chest_covid')), []) for k in range(3)]
    owner,gen = dict(zip(names + others[1], owners + others[2])),rng(0, 'copies')
    hashes,other_hashes = (np.array([perceptual_hash(a) for a in o]) for o in (nih, others[0]))
    for how in (('resize',), ('jpeg',), ('bright',), ('crop',), ('crop', 'resize', 'bright', 'jpeg'),
            ('crop', 'resize', 'burnt', 'jpeg')):
        hidden = [altered(a, gen, how) for a in nih]
        pairs = find_copies(nih, others[0] + hidden, names, others[1] + ['copy ' + o for o in names],
            show=False)
        hits = ('copy ' + pairs.image_a)==pairs.image_b
        wrong = sum(owner[a]!=owner[b.removeprefix('copy ')]
            for a,b in zip(pairs.image_a[~hits], pairs.image_b[~hits]))
        line = f"{' + '.join(how):32s} find_copies {hits.sum()/len(nih):.2%} found, {wrong} false"
        there = np.concatenate([other_hashes, np.array([perceptual_hash(a) for a in hidden])])
        ids = others[1] + names
        i,j = hamming_pairs(hashes, there, 8)
        for most in (4, 8):
            near = np.bitwise_count(hashes[i] ^ there[j])<=most
            hit = near & (j-len(others[0])==i)
            false = sum(owner[names[a]]!=owner[ids[b]] for a,b in zip(i[near & ~hit], j[near & ~hit]))
            line += f"   hash within {most} bits {hit.sum()/len(nih):.2%}, {false} false"
        print(line)
    twice = set(n.split('/')[-1][:12] for n in names)
    # the same films at 64 pixels are left out
    small = [k for k,n in enumerate(sets['chest_nih_64'][1]) if n[-16:-4] not in twice]
    sets['chest_nih_64'] = tuple([o[k] for k in small] for o in sets['chest_nih_64'])
    images,ids,of = (sum((s[k] for s in sets.values()), []) for k in range(3))
    # a right knee may look like the mirrored left one
    images,ids,of = images + [a[:,::-1] for a in images],ids + ['mirrored ' + o for o in ids],of + of
    start,patient = time.perf_counter(),dict(zip(ids, of))
    pairs = find_copies(images, ids=ids, least=.5, show=False)
    took = time.perf_counter() - start
    one = np.array([patient[a]==patient[b] for a,b in zip(pairs.image_a, pairs.image_b)])
    c = pairs.correlation.to_numpy()
    print(f"{len(images)} images and mirror images in {took:.0f} s; pairs of one patient from 0.85: "
        f"{int((one & (c>=.85)).sum())}; pairs of two patients: {int((~one & (c>.99)).sum())} equal, "
          f"{int((~one & (c>=.85) & (c<=.99)).sum())} from 0.85 to 0.99, the next at {c[~one & (c<.85)].max():.3f}")
    hashes = np.array([perceptual_hash(a) for a in images])
    for most in (4, 8):
        i,j = hamming_pairs(hashes, most=most)
        print(f"64-bit hash within {most} bits: {sum(of[a]!=of[b] for a,b in zip(i, j))} pairs of two patients")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='*', default=['split', 'sample', 'copies', 'find'])
    parser.add_argument('--images', type=int, default=100_000)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rows', type=int, default=1_000_000)
    args = parser.parse_args()
    for what in args.what:
        print(f'-- {what}')
        {'split': bench_split, 'sample': bench_sample, 'copies': bench_copies, 'find': bench_find}[what](args)


if __name__=='__main__': main()
