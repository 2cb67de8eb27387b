"What a search for the rate or an interrupted fit leaves behind: nothing that the next fit would see."
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from radiology_ai.data.load import xray_dataloaders
from radiology_ai.losses.base import WeightedCrossEntropy
from radiology_ai.models.backbone import XrayModel
from radiology_ai.semi.fixmatch import FixMatch, FlexMatch, FreeMatch, MeanTeacher, SoftMatch
from radiology_ai.semi.load import semi_dataloaders
from radiology_ai.train.callbacks import SeededRun
from radiology_ai.train.learner import xray_learner

matplotlib.use('Agg')


class Images:
    "60 striped images of three classes to train on, 30 to validate on."
    def __init__(self):
        gen,self.y = np.random.default_rng(0),np.arange(90)%3
        self.x = gen.uniform(20, 90, (90, 16, 16)).astype(np.uint8)
        for x,k in zip(self.x, self.y): x[2+4*k:4+4*k,2:14] = 230
        self.index = pd.DataFrame({'image_id': [f'im{i}' for i in range(90)]})
    def __len__(self): return 90
    def __getitem__(self, i): return self.x[i]
    def table(self, known):
        at = np.arange(90)
        return self.index.assign(patient_id=self.index.image_id, split=np.where(at<60, 'train', 'valid'),
            y=np.where((at<known) | (at>=60), self.y, np.nan))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3))
        return XrayModel(body, nn.Sequential(nn.Flatten(), nn.Dropout(.1), nn.Linear(72, 3)), {})

def semi(cb, make=xray_learner):
    dls = semi_dataloaders(Images(), Images().table(18), 'y', bs=6, mu=2, n_batches=4, seed=3, device='cpu')
    if make is Learner: return Learner(dls, network(), WeightedCrossEntropy(), cbs=[SeededRun(), cb])
    return make(dls, network(), pretrained=False, lr=.01, seed=5, metrics=[], monitor=None, cbs=[cb])

def supervised():
    dls = xray_dataloaders(Images(), Images().table(60), 'y', bs=8, device='cpu')
    return xray_learner(dls, network(), pretrained=False, lr=.01, seed=5)


@pytest.mark.parametrize('make', [supervised,
    *(lambda k=k: semi(k()) for k in (MeanTeacher, FlexMatch, FreeMatch,
    lambda: SoftMatch(align='labels')))])
def test_lr_find_leaves_no_trace(make):
    ways = []
    for look in (False, True):
        learn = make()
        with learn.no_bar(), learn.no_logging():
            if look: learn.lr_find(show_plot=False, num_it=12)
            learn.fit_two_phase(1)
        ways.append(learn)
    for a,b in zip(*(w.model.parameters() for w in ways)): assert torch.equal(a, b)


class Stop(Callback):
    order,on = 50,True
    def after_batch(self):
        if self.on: raise KeyboardInterrupt


def test_an_interrupt_in_a_plain_learner_doubles_nothing():
    learn,stop = semi(FixMatch(), Learner),Stop()
    learn.add_cb(stop)
    with learn.no_bar(), learn.no_logging():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt): learn.fit(1)
        stop.on = False
        learn.fit(1)
    names = list(learn.recorder.metric_names)
    assert sorted(names)==sorted(set(names)) and {'used', 'confidence'}<set(names)
    assert not [t for t in learn.dls.train.after_batch.fs if type(t).__name__=='_BeforeTransforms']
    assert learn.metrics==[] or not [m for m in learn.metrics if type(m).__name__=='GuessFigure']
