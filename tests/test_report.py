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
from radiology_ai.metrics import operating
from radiology_ai.metrics.intervals import Metric
from radiology_ai.report import page as report_page
from radiology_ai.report.card import Example, ReportData
from radiology_ai.report.charts import Chart
from radiology_ai.report.evaluation import evaluate_table
from radiology_ai.report.figures import HEADLINES, Headline
from radiology_ai.report.page import write_report
from radiology_ai.report.predictions import choose_thresholds
from radiology_ai.report.sections import Section, Table

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
        self.headings, self.outside, self.lang = [], [], None
        self.tables, self.captions = 0, 0
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
    one, two = (evaluate_table(o, labels=LABELS, draws=40) for o in (t, t.sample(frac=1, random_state=1)))
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
        with pytest.raises(DataError, match=said): evaluate_table(wrong, labels=LABELS, draws=40)
    outside = evaluate_table(t.assign(p_mass=7.), labels=LABELS, draws=40)['labels'][1]
    assert 'Scores reach from 7 to 7' in outside['calibration']['ece'][
        'reason'] and 'scores are 7' in outside['auroc']['reason']


def test_a_metric_at_the_threshold_needs_one_file(tmp_path, monkeypatch):
    rates = operating.call_rates
    def more(counts, *args, **kwargs):
        found = rates(counts, *args, **kwargs)
        return found | {'Youden': found['sensitivity'] + found['specificity'] - 1}
    monkeypatch.setattr(operating, 'call_rates', more)
    t = predictions()
    page = write_report(tmp_path, title='x', table=t, threshold=choose_thresholds(t), draws=40)
    youden = [o['operating']['Youden'] for o in json.loads(page.with_suffix('.json').read_text())['labels']]
    assert all(y['low']<=y['value']<=y['high'] for y in youden) and page.read_text().count('Youden (')==3


def test_a_headline_metric_needs_its_function_and_a_line(tmp_path, monkeypatch):
    def half(t, s): return float(np.mean((s>=.5)==(t>0)))
    metric = Metric(half, weighted=lambda t, s: lambda w: ((s>=.5)==(t>0))@w/w.sum(0))
    monkeypatch.setitem(HEADLINES, 'half', Headline('accuracy at one half', metric))
    t = predictions()
    page = write_report(tmp_path, title='x', table=t, labels=LABELS, draws=40)
    text, numbers = page.read_text(), json.loads(page.with_suffix('.json').read_text())
    figures = [o['half'] for o in numbers['labels']]
    assert numbers['mean']['half']['value']==pytest.approx(np.mean([f['value'] for f in figures]))
    assert all(f['low']<f['value']<f['high'] for f in [*figures, numbers['mean']['half']])
    assert 'Mean accuracy at one half' in text and '<th scope="col">accuracy at one half</th>' in text
    assert 'accuracy at one half' in numbers['claim'][27]['answer']
    single = t.rename(columns={'mass': 'target', 'p_mass': 'score'}).drop(columns=['p_effusion', 'p_hernia'])
    assert 'Accuracy at one half' in write_report(tmp_path, title='x', table=single, draws=40).read_text()


def test_an_evaluation_is_made_once(tmp_path, monkeypatch):
    t = predictions()
    fresh = write_report(tmp_path/'a.html', title='x', table=t, labels=LABELS, draws=40)
    known = evaluate_table(t, labels=LABELS, draws=40)
    def never(*args, **kwargs): raise AssertionError('evaluated again')
    monkeypatch.setattr(report_page, 'evaluate_table', never)
    given = write_report(tmp_path/'b.html', title='x', table=t, labels=LABELS, figures=known)
    assert fresh.read_text().replace('a.json', '')==given.read_text().replace('b.json', '')
    with pytest.raises(DataError, match='Give the figures of this table'):
        write_report(tmp_path, title='x', table=t[:250], labels=LABELS, figures=known)


def test_sections_of_a_task(tmp_path):
    t = predictions()
    figure = dict(value=.5, low=.4, high=.6, n=9, reason='')
    lost = dict(value=float('nan'), low=float('nan'), high=float('nan'), n=0, reason='no <lesion>')
    rows = [{'Lesion': 'small', 'found': figure, 'images': 1200, 'mm': .25},
        {'Lesion': 'large', 'found': lost,
        'images': 3, 'mm': 2.}]
    parts = ['As <marked> by readers.', Table('By size', rows), Chart('FROC', 'sensitivity by false boxes'),
        Chart('Sweep'), Example('hit', np.zeros((8, 8, 3), np.uint8), image_id='i1', truth='one box')]
    data = ReportData('Boxes', t, labels=LABELS,
        sections=[Section('Lesions', parts, {'CPM': figure}), Section('More')])
    page = write_report(tmp_path, data, draws=40)
    text, found = page.read_text(), Page(page.read_text())
    assert 'As &lt;marked&gt; by readers.' in text and 'n/a: no &lt;lesion&gt;' in text and '1,200' in text
    assert text.index('id="data"')<text.index('id="section-1"')<text.index('id="discrimination"')
    assert '<a href="#section-1">Lesions</a>' in text and '<span class="name">CPM</span>' in text
    assert found.tables==found.captions and all(b<=a+1 for a, b in zip(found.headings, found.headings[1:]))
    numbers = json.loads(page.with_suffix('.json').read_text())['sections']
    assert numbers[0]['cards']['CPM']['value']==.5 and numbers[0]['parts'][1]['table']['rows'][1]['found'][
        'value'] is None
    with pytest.raises(DataError, match="Section 'x' holds a int"):
        write_report(tmp_path, ReportData('x', t, labels=LABELS, sections=[Section('x', [3])]), draws=40)


def test_facts_of_any_kind(tmp_path):
    facts = {'arch': np.array([1, 2]), 'lr': np.float32(.5), 'folder': tmp_path,
        'when': pd.Timestamp('2026-01-02'),
        'monitor': '', 'settings': {'monitor': 'auroc', 'operator': 'Doe'}}
    page = write_report(tmp_path, title='x', table=predictions(), labels=LABELS, facts=facts, draws=40)
    numbers = json.loads(page.with_suffix('.json').read_text())
    assert numbers['facts']=={'arch': [1, 2], 'lr': .5, 'folder': tmp_path.name,
        'when': '2026-01-02 00:00:00',
        'monitor': '', 'settings': {'monitor': 'auroc'}}
    assert numbers['claim'][25]['answer']=='best epoch by: auroc' and 'Doe' not in page.read_text()


@pytest.mark.slow
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
