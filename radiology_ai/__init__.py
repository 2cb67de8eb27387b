__version__ = "0.3.0"

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType


class _During:
    """Finds one module of another package. While that is imported, and only then, what `modules` give stands in
    `sys.modules`."""
    def __init__(self, name, *modules): self.name, self.modules = name, modules

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name==self.name else None
        if spec is not None and spec.loader is not None: spec.loader.exec_module = self.around(spec.loader.exec_module)
        return spec

    def around(self, run):
        def exec_module(module):
            modules = {name: m for give in self.modules for name, m in give().items()}
            was = {name: sys.modules[name] for name in modules if name in sys.modules}
            sys.modules.update(modules)
            try: run(module)
            finally:
                for name, stood in modules.items():
                    if name in sys.modules and sys.modules[name] is stood: del sys.modules[name]
                sys.modules.update({name: m for name, m in was.items() if name not in sys.modules})
            if self in sys.meta_path: sys.meta_path.remove(self)
        return exec_module


class _Quietly(_During):
    "While the module is imported, warnings that speak to its programmers are not shown."
    def around(self, run):
        def exec_module(module):
            import warnings
            with warnings.catch_warnings():
                for kind in (FutureWarning, DeprecationWarning): warnings.simplefilter('ignore', kind)
                warnings.filterwarnings('ignore', 'IProgress not found')
                run(module)
            if self in sys.meta_path: sys.meta_path.remove(self)
        return exec_module


class _Later(ModuleType):
    "Stands in for a module that is not loaded, and imports it when something of it is asked for."
    def __getattr__(self, name):
        if name.startswith('__'): raise AttributeError(name)
        for other in [n for n, m in sys.modules.items() if type(m) is _Later]: del sys.modules[other]
        return getattr(import_module(self.__name__), name)


def _no_dl():
    """gdcm, which pydicom imports, says `import dl`, once a module of Python 2, and would take a folder or file of that
    name in the working directory for it: there is none."""
    return {'dl': None, 'DLFCN': None}


def _later(name, function=None):
    """A module, and the package it is in, as `_Later` where they are not loaded. What is imported from it by name is a
    function, which imports the module when it is called."""
    def modules():
        package, _, last = name.rpartition('.')
        found = {n: _Later(n) for n in (package, name) if type(sys.modules.get(n, _Later(n))) is _Later}
        if name not in found: return {}
        module = found[name]
        if package in found: setattr(found[package], last, module)
        if function: setattr(module, function, lambda *args, **kw: module.__getattr__(function)(*args, **kw))
        return found
    return modules


def _no_compiler():
    """timm says with `torch.compiler.disable` what is not to be compiled, which imports the compiler of torch; torch's
    own form of it does so when such a function is called."""
    found = _later('torch._dynamo')() if 'torch' in sys.modules else {}
    def disable(fn=None, recursive=True, **kw): return import_module('torch._compile')._disable_dynamo(fn, recursive)
    for module in found.values(): module.disable = disable
    return found


# torchvision imports the compiler of torch (a second and a half) for a rare way to align boxes, timm for one family of
# networks: where they are called it comes then
for _one in (_During('gdcm', _no_dl),
        _During('torchvision.ops.roi_align', _later('torch._dynamo.utils', 'is_compile_supported')),
        _During('timm.models.naflexvit', _no_compiler),
        _Quietly('fastai.layers'), # its torch.jit.script is deprecated
        _Quietly('tqdm.auto')): # a notebook without ipywidgets has its bars as text
    if _one.name not in sys.modules: sys.meta_path.insert(0, _one)
