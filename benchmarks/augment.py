"""`BatchAugment` beside kornia's AugmentationSequential and torchvision v2: the same eight operations on one batch,
and boxes against a warped-mask oracle.

    python benchmarks/augment.py [--repeats 9] [--threads 2] [--device cpu] [--draws 10000]

Three chains of eight operations: with two movements (turn with shift and scale, mirror image), with four (turn with
shift, scale and shear, perspective, random resized crop, mirror image) and with five (elastic bending as well,
whose large blur is most of the peers' time). Each image has its own draw: kornia does so by itself; torchvision
draws once for a call and is therefore called for each image, as its users do; `one draw for all` is its cheaper
call for the whole batch. The repeats take turns, so that a busy machine is busy for all; the table has medians and
their ratios, on the clock and in processor time, which other processes disturb less.
"""
import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from radiology_ai.vision.augment import BatchAugment

LINEAR = InterpolationMode.BILINEAR
SIZE = 224


class Each(torch.nn.Module):
    "A tensor function as a transform of torchvision."
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)


def ours(movements: str):
    few = dict(rotation=15, translation=.06, scale=(.9, 1.1), flip=.5, brightness=.2, contrast=.2, p=1)
    if movements=='few': return BatchAugment(**few, gamma=(.8, 1.25), noise=.05, blur=1.5/SIZE, erase=1)
    many = dict(**few, shear=8, perspective=.2, crop=(.6, 1), noise=.05)
    return (BatchAugment(**many, gamma=(.8, 1.25)) if movements=='four'
        else BatchAugment(**many, elastic=.04, gamma=(1, 1)))


def kornia_chain(movements: str):
    affine = dict(degrees=15, translate=(.06, .06), scale=(.9, 1.1), p=1.)
    if movements=='few':
        ops = [K.RandomHorizontalFlip(p=.5), K.RandomAffine(**affine), K.RandomGamma((.8, 1.25), p=1.),
            K.RandomContrast((.8, 1.2), p=1.), K.RandomBrightness((.8, 1.2), p=1.),
               K.RandomGaussianBlur((9, 9), (.1, 1.5), p=1.), K.RandomGaussianNoise(std=.03, p=1.),
               K.RandomErasing((.02, .15), (.5, 2), p=1.)]
    else:
        other = (K.RandomGamma((.8, 1.25), p=1.) if movements=='four'
            else K.RandomElasticTransform(kernel_size=(63, 63), sigma=(16., 16.), alpha=(1., 1.), p=1.))
        ops = [K.RandomHorizontalFlip(p=.5), K.RandomAffine(**affine, shear=8), K.RandomPerspective(.2, p=1.),
            other,
               K.RandomResizedCrop((SIZE, SIZE), scale=(.6, 1), p=1.), K.RandomContrast((.8, 1.2), p=1.),
               K.RandomBrightness((.8, 1.2), p=1.), K.RandomGaussianNoise(std=.03, p=1.)]
    return K.AugmentationSequential(*ops, data_keys=['input'])


def torchvision_chain(movements: str):
    affine = dict(degrees=15, translate=(.06, .06), scale=(.9, 1.1), interpolation=LINEAR)
    light = v2.ColorJitter(brightness=.2, contrast=.2) # two operations
    gamma = Each(lambda x: v2.functional.adjust_gamma(x, float(torch.empty(1).uniform_(.8, 1.25))))
    if movements=='few':
        return v2.Compose([v2.RandomHorizontalFlip(.5), v2.RandomAffine(**affine), gamma, light,
            v2.GaussianBlur(9, (.1, 1.5)), v2.GaussianNoise(sigma=.03),
            v2.RandomErasing(1., (.02, .15), (.5, 2))])
    return v2.Compose([v2.RandomHorizontalFlip(.5), v2.RandomAffine(**affine, shear=8),
        v2.RandomPerspective(.2, p=1., interpolation=LINEAR),
        gamma if movements=='four' else v2.ElasticTransform(30., 8., interpolation=LINEAR),
                       v2.RandomResizedCrop(SIZE, scale=(.6, 1), interpolation=LINEAR, antialias=False),
                       light, v2.GaussianNoise(sigma=.03)])


def timed(ways: dict, repeats: int, device: str) -> dict:
    "Median seconds of each way, on the clock and of the processor, the ways taking turns."
    wait = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    spent = {name: [] for name in ways}
    for k in range(repeats+1):
        for name,f in ways.items():
            wait()
            start = time.perf_counter(),time.process_time()
            f()
            wait()
            if k: spent[name].append((time.perf_counter()-start[0], time.process_time()-start[1]))
    return {name: np.median(s, 0) for name,s in spent.items()}


def speed(repeats: int, device: str):
    x = torch.rand(64, 1, SIZE, SIZE, device=device)
    for movements,title in (('few', 'two of eight are movements'), ('four', 'four of eight are movements'),
            ('five', 'five of eight are movements')):
        aug,kornia,tv = ours(movements),kornia_chain(movements),torchvision_chain(movements)
        def each(tv=tv): return torch.stack([tv(i) for i in x])
        ways = {'BatchAugment': partial(aug, x), 'kornia AugmentationSequential': partial(kornia, x),
            'torchvision v2, a draw for each image': each, 'torchvision v2, one draw for all': partial(tv, x)}
        t = timed(ways, repeats, device)
        print(f"\n{title}: {len(x)} x 1 x {SIZE} x {SIZE}, {device}, {torch.get_num_threads()} threads, median of {repeats}")
        print(f"{'':40s} {'ms':>8s} {'images/s':>9s} {'x ours':>7s} {'CPU ms':>8s} {'x ours':>7s}")
        for name,(s,cpu) in t.items():
            print(f"{name:40s} {s*1e3:8.1f} {len(x)/s:9.0f} {s/t['BatchAugment'][0]:7.2f} {cpu*1e3:8.1f} {cpu/t['BatchAugment'][1]:7.2f}")


def boxes(draws: int):
    sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
    from augment_oracle import CHAINS, compare
    print(f"\nboxes and points against the warped-mask oracle, {draws} draws of each chain\n{'':14s} "
        f"{'boxes':>7s} {'mean IoU':>9s} {'least IoU':>10s} {'largest point error, pixels':>28s}")
    for name,settings in CHAINS.items():
        found = compare(settings, draws, seed=1)
        print(f"{name:14s} {len(found.iou):7d} {found.iou.mean():9.5f} {found.iou.min():10.5f} {found.point.max():28.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--draws', type=int, default=10_000)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads)
    if args.repeats: speed(args.repeats, args.device)
    if args.draws: boxes(args.draws)


if __name__=='__main__': main()
