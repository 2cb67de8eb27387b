"""The report as a reader, a printer and a screen reader meet it: the published figures of CheXNet, the same
bytes each time, nothing from outside, headings and tables that can be followed."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from radiology_ai.core import DataError, rng
from radiology_ai.data.chest import chestxray14
from radiology_ai.report.card import ReportData
from radiology_ai.report.figures import choose_thresholds, evaluate_table
from radiology_ai.report.page import write_report

LABELS = ['effusion', 'mass', 'hernia']


def predictions(n=300, seed=0):
    gen = rng(seed, 'report test')
    t = (gen.random((n, 3))<(.3, .2, .15)).astype(float)
    p = 1/(1+np.exp(-(gen.normal(0, 1.2, (n, 3)) + 2*t - 1.5)))
    t[gen.random((n, 3))<.1] = np.nan
    return pd.DataFrame({'image_id': [f'i{k:03d}' for k in range(n)],
        'patient_id': [f'secret{k//2}' for k in range(n)], 'sex': gen.choice(['F', 'M'], n),
        'split': np.where(np.arange(n)<100, 'valid', 'test'),
                         **dict(zip(LABELS, t.T)), **dict(zip([f'p_{l}' for l in LABELS], p.T))})


class Page(HTMLParser):
    "Headings in their order, tables without a caption, and whatever refers to another place."
    def __init__(self, text):
        super().__init__()
        self.headings, self.tables, self.captions, self.outside, self.lang = [], 0, 0, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if re.fullmatch('h[1-6]', tag): self.headings.append(int(tag[1]))
        self.tables += tag=='table'
        self.captions += tag=='caption'
        if tag=='html': self.lang = a.get('lang')
        self.outside += [v for k, v in a.items() if k in ('src', 'href', 'action', 'data')
            and not v.startswith(('#', 'data:'))]


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    t = predictions()
    return write_report(tmp_path_factory.mktemp('report'), title='Three findings', table=t, labels=LABELS,
        threshold=choose_thresholds(t), subgroups=('sex',), manifest=t, draws=60,
                        others={'other': t.assign(p_mass=.5)},
                        facts={'architecture': 'resnet18', 'patient_name': 'Doe'})


def test_a_screen_reader_can_follow(page):
    found = Page(page.read_text())
    assert found.lang=='en' and found.headings[0]==1 and found.headings.count(1)==1
    assert all(b<=a+1 for a, b in zip(found.headings, found.headings[1:])), 'a level of headings is left out'
    assert found.tables==found.captions>=6


def test_nothing_is_loaded_and_nobody_is_named(page):
    text = page.read_text() + page.with_suffix('.json').read_text()
    assert Page(page.read_text()).outside==[] and '<script' not in text and '@import' not in text
    assert 'secret' not in text and 'Doe' not in text


def test_no_figure_without_interval_and_n(page):
    def figures(o):
        if isinstance(o, dict):
            if {'value', 'reason'}<=set(o): yield o
            for v in o.values(): yield from figures(v)
        elif isinstance(o, list):
            for v in o: yield from figures(v)
    found = list(figures(json.loads(page.with_suffix('.json').read_text())))
    assert len(found)>60
    assert all(f['n']>=0 and (f['reason'] or f['low']<=f['value']<=f['high']) for f in found)


def test_same_content_same_bytes_in_any_order(tmp_path):
    t = predictions()
    a, b = (write_report(tmp_path/f'{k}.html', title='x', table=o, labels=LABELS, subgroups=('sex',),
        draws=40) for k, o in (('a', t), ('a2', t)))
    assert a.read_bytes().replace(b'a.json', b'')==b.read_bytes().replace(b'a2.json', b'')
    one, two = (evaluate_table(o, labels=LABELS, n=40) for o in (t, t.sample(frac=1, random_state=1)))
    for x, y in zip(one['labels'], two['labels']):
        assert np.isclose(x['auroc']['low'], y['auroc']['low'], rtol=0,
            atol=1e-12) and x['positives']==y['positives']
    assert one['worst']==two['worst']


def test_refusals_and_reasons(tmp_path):
    t = predictions()
    def alarms(**kwargs):
        return json.loads(write_report(tmp_path/'r.html', title='x', draws=40,
            **{'table': t, 'labels': LABELS, **kwargs}).with_suffix('.json').read_text())['warnings']
    few = [l for l in LABELS if (t[t.split=='test'][l]==1).sum()<30]
    assert alarms()==[f"Fewer than 30 images of the smaller class, so that figures are rough: {', '.join(few)}."]
    trained = t.assign(split='test')
    assert any('belong to training or validation' in w for w in alarms(table=trained, manifest=t))
    assert any('patients of the test set' in w
        for w in alarms(threshold=choose_thresholds(t.assign(split='valid'))))
    assert any('no mean over labels' in w for w in alarms(table=t.assign(hernia=0.)))
    assert any('All scores are equal for mass' in w for w in alarms(table=t.assign(p_mass=.3)))
    for wrong, said in ((t.assign(split='train'), 'no test images'), (pd.concat([t, t]), 'more than once'),
            (t.drop(columns='p_mass'), "no column 'p_mass'"), (t.assign(mass=3), 'The target of image'),
                        (t.assign(p_mass=np.inf), 'The score of image'),
                        (t.assign(patient_id=None), 'The patient of image'),
                        (t.assign(mass=np.nan, effusion=np.nan, hernia=np.nan),
                        'No image has a known target')):
        with pytest.raises(DataError, match=said): evaluate_table(wrong, labels=LABELS, n=40)
    outside = evaluate_table(t.assign(p_mass=7.), labels=LABELS, n=40)['labels'][1]
    assert 'Scores reach from 7 to 7' in outside['calibration']['ece'][
        'reason'] and 'scores are 7' in outside['auroc']['reason']


def test_chexnet_as_published(real_data, tmp_path):
    scores = pd.read_csv(real_data/'predictions/preds.csv.gz').rename(columns=lambda c: c.replace('prob_',
        'p_')).rename(columns={'Image Index': 'image_id'})
    published = pd.read_csv(real_data/'predictions/aucs.csv').set_index('label').auc
    truth = chestxray14(real_data/'labels/nih/Data_Entry_2017_v2020.csv.gz').manifest
    table = scores.merge(truth.drop(columns='split'), on='image_id', validate='1:1')
    data = ReportData('CheXNet', table, labels=list(published.index), subgroups=('sex',))
    numbers = json.loads(write_report(tmp_path, data, draws=40).with_suffix('.json').read_text())
    found = {o['label']: o for o in numbers['labels']}
    assert numbers['images']==len(scores)==22433
    for label, auc in published.items():
        assert round(found[label]['auroc']['value'], 4)==round(auc,
            4) and found[label]['auroc']['low']<auc<found[label]['auroc']['high']


@pytest.mark.skipif(not (shutil.which('chromium') or shutil.which('google-chrome')),
    reason='no Chromium on this machine')
def test_it_opens_and_prints_in_a_browser(page, tmp_path):
    def browser(*args):
        subprocess.run([shutil.which('chromium') or shutil.which('google-chrome'), '--headless',
            '--no-sandbox', '--disable-gpu', '--disable-quic', f'--user-data-dir={tmp_path}/profile', *args,
            page.as_uri()], check=True, capture_output=True, timeout=120)
    browser(f'--screenshot={tmp_path}/page.png', '--window-size=1360,2000', '--hide-scrollbars')
    browser(f'--print-to-pdf={tmp_path}/page.pdf', '--no-pdf-header-footer')
    from PIL import Image
    seen = np.asarray(Image.open(tmp_path/'page.png').convert('L'))
    assert seen.shape==(2000, 1360) and (seen<128).mean()>.002 and np.all(seen[:,
        -20:]>200), 'the page is empty, or wider than the window'
    assert 3<=len(re.findall(rb'/Type\s*/Page\b', (tmp_path/'page.pdf').read_bytes()))<=12
