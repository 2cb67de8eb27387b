"""Bundles that stay: what `tests/test_lasting.py` loads in every later version and with every supported timm.

`python tests/make_bundles.py` writes those that are not there yet to `tests/data/bundles/`, each with an input
(`case.npz`: `x` uint8) and what it said of it then (`logits`, and the task's `probabilities`). One that is there is never
written again: it stands for the bundles that users have kept. A new task, or a new format, adds one with a new name."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from radiology_ai.losses.alignment import Template
from radiology_ai.models.backbone import create_model
from radiology_ai.models.bundle import load_bundle, save_bundle
from radiology_ai.models.detector import create_detector
from radiology_ai.models.heads import tree_parents
from radiology_ai.models.segmenter import create_segmenter
from radiology_ai.models.stn import ORIENTATION, PARAMETERS, create_aligner
from radiology_ai.preprocess.recipe import recipe
from radiology_ai.tasks.chest import CHEST, ChestSettings
from radiology_ai.tasks.knee import KNEE
from radiology_ai.tasks.masks import mask_answers
from radiology_ai.tasks.pneumonia import PNEUMONIA
from radiology_ai.tasks.pneumothorax import PNEUMOTHORAX

FOLDER = Path(__file__).parent/'data'/'bundles'
SIZE = 64


def settled(model, seed=0):
    "The network after a few batches in training: its BatchNorms have figures of their own."
    gen = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(3): model(torch.rand(16, 1, SIZE, SIZE, generator=gen))
    return model.eval()


def knee(arch, path):
    "Six grades, mended by a line a grade."
    model = settled(create_model(arch, 7, pretrained=False, prior=[.7, *[.05]*6], dropout=.1, size=SIZE,
        seed=1))
    model.head.rescale(np.linspace(.8, 1.4, 7), np.linspace(-.2, .3, 7))
    save_bundle(model, path, recipe('knee', size=SIZE), list(range(7)), task='knee', threshold=.31,
        settings={'label': 'schatzker', 'arch': arch}, answer={'kind': 'grades', 'activation': 'softmax'})


def chest(arch, path):
    "The 32 categories under their tree, mended by a line a category."
    s = ChestSettings(arch=arch)
    answer, vocab = CHEST.answer.of_run(s), s.labels
    model = settled(create_model(arch, len(vocab), pretrained=False, multi_label=True, size=SIZE, seed=2,
        parents=tree_parents(answer.tree)))
    model.head.rescale(np.linspace(.7, 1.5, len(vocab)), np.linspace(-.5, .5, len(vocab)))
    spec = {'kind': 'tree', 'activation': 'sigmoid', 'hierarchy': 'max', 'calls': 'sp95',
        'frequency': dict.fromkeys(vocab, .1), 'tree': {'names': answer.tree.names,
        'parents': answer.tree.parents,
            'tiers': answer.tree.tiers, 'order': answer.tree.order, 'normal': answer.tree.normal}}
    save_bundle(model, path, recipe('chest', size=SIZE), vocab, task='chest', threshold=[.4]*len(vocab),
        settings={'arch': arch}, answer=spec)


def masks(arch, path):
    "Two masks."
    model = settled(create_segmenter(arch, 2, pretrained=False, width=.125, seed=3))
    save_bundle(model, path, recipe('chest', size=SIZE), ['left lung', 'right lung'], task='lungs')


def pneumothorax(arch, path):
    "Masks and a label of the whole film, with the three thresholds."
    model = settled(create_segmenter(arch, 1, pretrained=False, width=.125, n_labels=1, seed=4))
    answer = replace(PNEUMOTHORAX.answer, fit={'call': .4, 'area': .001, 'draw': .3})
    save_bundle(model, path, recipe('chest', size=SIZE), ['Pneumothorax'], task='pneumothorax', stage='call',
        threshold=.4, settings={'arch': arch}, answer=answer.spec(None, ['Pneumothorax'], None))


def pneumonia(arch, path):
    "Boxes and the class of the whole film, with how they are decoded."
    model = settled(create_detector(arch, 1, pretrained=False, width=.0625, levels=(3, 4, 5), seed=5))
    save_bundle(model, path, recipe('chest', size=SIZE), PNEUMONIA.answer.vocab(None, None),
        task='pneumonia', threshold=.3, settings={'arch': arch})


def alignment(arch, path):
    "One pose, with orientations; a template of a bright square."
    image = torch.zeros(1, 64, 64)
    image[:, 16:48, 20:44] = 1
    model = settled(create_aligner(arch, 'scales', pretrained=False, size=SIZE, head='field', orient=True, stages=4,
        template=Template(image), seed=6))
    gen = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for w in model.head.parameters(): w += .1*torch.randn(w.shape, generator=gen)
    save_bundle(model, path, recipe('chest', size=SIZE), [*PARAMETERS['scales'], 'confidence', *ORIENTATION],
        task='alignment', settings={'arch': arch})


BUNDLES = {'knee_resnet': (knee, 'test_resnet'), 'knee_vit': (knee, 'test_vit'),
    'chest_resnet': (chest, 'test_resnet'),
    'chest_vit': (chest, 'test_vit'), 'masks_efficientnet': (masks, 'test_efficientnet'),
    'pneumothorax_efficientnet': (pneumothorax, 'test_efficientnet'),
    'pneumonia_efficientnet': (pneumonia, 'test_efficientnet'),
    'alignment_resnet': (alignment, 'test_resnet')}
TASKS = {'knee': KNEE, 'chest': CHEST}
# of each task; a transformer with a decoder is never small, and the network of lungs is that of the masks, which stands for it
KINDS = {'knee': ('resnet', 'vit'), 'chest': ('resnet', 'vit'), 'pneumonia': ('efficientnet',),
    'pneumothorax': ('efficientnet',), 'lungs': (), 'alignment': ('resnet',)}


class Films(list):
    "What an `ImageStore` is to a kind of answer."


def logits(bundle, x) -> np.ndarray:
    "(B, C) of a classifier, (B, C, H, W) of masks, and of masks with a label both in a row."
    if bundle.task=='alignment':
        with torch.no_grad(): told = bundle.model.tell(torch.from_numpy(x[:, None]/np.float32(255)))
        return torch.cat([told.matrix.flatten(1).double(), told.confidence[:, None].double()], 1).numpy()
    if not bundle.model.config.get('n_labels'): return bundle.logits(x)
    with torch.no_grad(): out = bundle.model(torch.from_numpy(x[:, None]/np.float32(255)))
    if isinstance(out, dict): out = [out[k] for k in ('logits', 'offsets', 'classes')]
    return torch.cat([o.flatten(1) for o in out], 1).numpy()


def probabilities(bundle, x) -> np.ndarray:
    "What the task of a bundle makes of images; of masks their probabilities."
    if bundle.task=='pneumothorax':
        pixels, films = mask_answers([bundle.model], torch.from_numpy(x[:, None]/np.float32(255)), mirror=True,
            joint=bundle.answer.get('joint', False))
        return np.concatenate([pixels.reshape(len(x), -1), films[:, None]], 1)
    if bundle.task=='pneumonia': return 1/(1+np.exp(-logits(bundle, x))) # as boxes are scored
    if bundle.task=='alignment': return logits(bundle, x)
    if bundle.task not in TASKS: return bundle.probabilities(x)
    answer = TASKS[bundle.task].answer.of_bundle(bundle.answer)
    return answer.probabilities([bundle.model], Films(x), range(len(x)), show=False)


def main():
    "Write what is missing."
    for name, (make, arch) in BUNDLES.items():
        if (FOLDER/name).exists(): continue
        make(arch, FOLDER/name)
        x = np.random.default_rng(5).integers(0, 256, (4, SIZE//8, SIZE//8), dtype=np.uint8)
        x = x.repeat(8, 1).repeat(8, 2)
        x[2:] = np.random.default_rng(6).integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
        bundle = load_bundle(FOLDER/name)
        np.savez_compressed(FOLDER/name/'case.npz', x=x, logits=logits(bundle, x),
            probabilities=probabilities(bundle, x))
        print(name, sum(p.stat().st_size for p in (FOLDER/name).iterdir())//1000, 'kB')


if __name__=='__main__': main()
