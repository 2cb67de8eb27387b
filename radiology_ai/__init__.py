__version__ = "0.2.0"

import sys
from importlib.machinery import PathFinder


class _Gdcm:
    """Finds gdcm, which pydicom imports: gdcm says `import dl`, once a module of Python 2, and would take a folder or
    file of that name in the working directory for it. While gdcm is imported, and only then, there is no `dl`."""
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name=='gdcm' else None
        if spec is not None and spec.loader is not None: spec.loader.exec_module = _without_dl(spec.loader.exec_module)
        return spec


def _without_dl(run):
    def exec_module(module):
        was = {name: sys.modules[name] for name in ('dl', 'DLFCN') if name in sys.modules}
        sys.modules.update(dl=None, DLFCN=None)
        try: run(module)
        finally:
            for name in ('dl', 'DLFCN'): del sys.modules[name]
            sys.modules.update(was)
        if _Gdcm in sys.meta_path: sys.meta_path.remove(_Gdcm)
    return exec_module


if 'gdcm' not in sys.modules: sys.meta_path.insert(0, _Gdcm)
