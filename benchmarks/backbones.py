"""Which architectures take radiographs of any size: the smallest of each family of timm, made by `create_backbone` for
one channel at several sizes and run forward once.

    python benchmarks/backbones.py [--sizes 128,160,224] [--largest 100]

Prints a line for each family that does not answer at one of the sizes, with the reason that a user reads, and the count of those
that do. `--largest` leaves families out whose smallest network has more million parameters."""
import argparse
import time
import warnings

import torch
from timm.models import list_models, list_modules

from radiology_ai.core import ModelError
from radiology_ai.models.backbone import create_backbone, list_backbones


def million(name: str) -> float:
    "Parameters of an architecture, without memory for them."
    import timm
    try:
        with torch.device('meta'):
            return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())/1e6
    except Exception: return float('inf') # some can't be made without memory


def answer(name: str, size: int) -> str:
    "'' or why a network gives no map of images of this size."
    try:
        body, n = create_backbone(name, 1, pretrained=False, size=size)
        with torch.no_grad(): maps = body.eval()(torch.rand(1, 1, size, size))
    except ModelError as e: return f'{e.what}'
    except Exception as e: return f'RAW {type(e).__name__}: {e}' # what no user should meet
    return ('' if maps.ndim==4 and maps.shape[1]==n and torch.isfinite(maps).all()
        else f'gives {tuple(maps.shape)}')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', default='128,160,224')
    parser.add_argument('--largest', type=float, default=100)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    sizes, offered = [int(s) for s in args.sizes.split(',')], set(list_backbones())
    fine, known, left, start = 0, 0, [], time.perf_counter()
    for module in list_modules():
        names = [n for n in list_models(module=module) if n in offered]
        if not names: continue
        count, name = min((million(n), n) for n in sorted(names, key=len)[:12])
        if args.largest<count<float('inf'):
            left.append(name)
            continue
        known += 1
        said = {s: why for s in sizes if (why := answer(name, s))}
        fine += not said
        for s, why in said.items(): print(f'{module:<22} {name:<32} {s:>4}  {why[:120]}', flush=True)
    print(f'\n{fine} of {known} families answer at {", ".join(map(str, sizes))} pixels; '
        f'{len(left)} larger than {args.largest:g} million were left out: {", ".join(left)}. {time.perf_counter()-start:.0f} s')


if __name__=='__main__': main()
