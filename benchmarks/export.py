"""Networks as ONNX: how far from torch, and how fast: every stored bundle of a task, and usual CNNs and a ViT at 224 pixels.

`python benchmarks/export.py [--runs 5]`: a table in Markdown. `--forms`: the stored bundles by each exporter, how far from
torch. One thread; images a second, batch of 8, median of the runs;
both in turn, so that other work on the machine meets both."""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np  # noqa: E402 (threads are told before)
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))

BATCH = 8
MADE = ('resnet18', 'tf_efficientnet_lite0', 'deit_tiny_patch16_224')


def speed(calls: dict, n: int, runs: int) -> dict:
    "Images a second of each, in turn."
    for f in calls.values(): f()
    took = {k: [] for k in calls}
    for _ in range(runs):
        for k, f in calls.items():
            start = time.process_time()
            f()
            took[k].append(time.process_time()-start)
    return {k: n/np.median(v) for k, v in took.items()}


def row(name: str, bundle, x: np.ndarray, folder: Path, runs: int) -> str:
    from radiology_ai.models.export import fewer_bits, write_onnx
    from radiology_ai.models.onnx import load_onnx
    told = write_onnx(bundle, folder/'a.onnx', x)
    few = fewer_bits(folder/'a.onnx', folder/'b.onnx', x, 'int8')
    images = np.resize(x, (BATCH, *x.shape[1:]))
    files, tensor = [load_onnx(folder/f).model for f in ('a.onnx', 'b.onnx')], torch.from_numpy(images)
    def eager():
        with torch.inference_mode(): bundle.model(tensor)
    got = speed({'eager': eager, 'onnx': lambda: files[0](images), 'int8': lambda: files[1](images)}, BATCH,
        runs)
    far = ', '.join(f"{k} {v['off']:.0e}" for k, v in told['parity'].items())
    far8 = ', '.join(f"{k} {v['off']:.2g}" for k, v in few['difference'].items())
    size = [os.path.getsize(folder/f)/1e6 for f in ('a.onnx', 'b.onnx')]
    return (f"| {name} | {x.shape[2]} | {far} | {got['eager']:.0f} | {got['onnx']:.0f} ({got['onnx']/got['eager']:.1f}x) | "
        f"{got['int8']:.0f} ({got['int8']/got['eager']:.1f}x) | {far8} | {size[0]:.1f} / {size[1]:.1f} |")


def forms(name: str, bundle, x: np.ndarray, folder: Path) -> str:
    "By the script exporter, by dynamo and as a program of torch.export: the differences, or why there is none."
    from radiology_ai.core import RadiologyError
    from radiology_ai.models.export import write_onnx, write_program
    def one(write, file, **how):
        start = time.process_time()
        try: told = write(bundle, folder/file, x, **how)
        except RadiologyError as e: return e.what[:60]
        far = ', '.join(f"{k} {v['off']:.0e}" for k, v in told['parity'].items())
        return f'{far} ({time.process_time()-start:.1f} s)'
    cells = one(write_onnx, 'a.onnx'), one(write_onnx, 'd.onnx', dynamo=True), one(write_program, 'p.pt2')
    return f"| {name} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--networks', default=','.join(MADE))
    parser.add_argument('--forms', action='store_true', help='the stored bundles by each exporter')
    args = parser.parse_args()
    from make_bundles import FOLDER

    from radiology_ai.models.backbone import create_model
    from radiology_ai.models.bundle import load_bundle, save_bundle
    from radiology_ai.preprocess.recipe import recipe
    from radiology_ai.serve.export import simulated_films
    torch.set_num_threads(1)
    stored = sorted(p for p in FOLDER.iterdir() if not p.name.startswith('alignment')) # of no form as ONNX
    if args.forms:
        print('| network | script | dynamo | torch.export |\n|---|---|---|---|', flush=True)
        with tempfile.TemporaryDirectory() as tmp:
            for path in stored:
                bundle = load_bundle(path)
                print(forms(path.name, bundle, simulated_films(bundle.recipe), Path(tmp)), flush=True)
        return
    print('| network | pixels | from torch | eager | onnxruntime | int8 | int8 from fp32 | MB fp32 / int8 |')
    print('|---|---|---|---|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        for path in stored:
            bundle = load_bundle(path)
            print(row(path.name, bundle, simulated_films(bundle.recipe), Path(tmp), args.runs), flush=True)
        for name in args.networks.split(','):
            model = create_model(name, 3, pretrained=False, size=224, seed=0)
            path = save_bundle(model, Path(tmp)/name.replace('/', '_'), recipe('knee', size=224), [0, 1, 2])
            bundle = load_bundle(path)
            print(row(name, bundle, simulated_films(bundle.recipe), Path(tmp), args.runs), flush=True)


if __name__=='__main__': main()
