"""Sphinx settings of the site; `docs/build.py` stages the pages and calls Sphinx."""
from configparser import ConfigParser
from pathlib import Path

_ini = ConfigParser(delimiters=['='])
_ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
_ini = _ini['DEFAULT']

project = _ini['lib_name']
author = _ini['author']
copyright = author
release = version = _ini['version']

extensions = ['myst_nb']
source_suffix = {'.ipynb': 'myst-nb'}
root_doc = 'index'
exclude_patterns = ['_build', '**.ipynb_checkpoints']

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['attrs_block', 'dollarmath', 'deflist']
myst_heading_anchors = 6
myst_dmath_double_inline = True

html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    'repository_url': _ini['git_url'],
    'repository_branch': 'main',
    'use_repository_button': True,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'show_navbar_depth': 1,
    'show_toc_level': 2,
    'home_page_in_toc': True,
    'navbar_persistent': [],
}
