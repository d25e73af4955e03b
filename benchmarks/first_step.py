"""Runs a console command of brqat and says when things happened in it; benchmarks/startup.py starts it.

    python benchmarks/first_step.py OUT.json step|phases|runs MODULE:FUNCTION ARGUMENT...

step    the moment after the first training step of the quantized network, where the run is then told to stop
phases  besides, where the time until then went; to look costs some hundredths of a second
runs    the moment each run of a multirun began and ended, and the seconds of it that were epochs

Moments are time.monotonic() less BRQAT_STARTED, the same clock when the process was started. Names that a version of
brqat does not have are left out, and imports count as imports wherever they happen.
"""

import sys
import time

BEGAN = time.monotonic()

import builtins  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402

# phase -> the functions whose time it is, as module:name
PHASES = {
    "data": ["brqat.train:_make(dataset)"],
    "float baseline": ["brqat.train:_baseline_key", "brqat.baseline:FloatBaseline.load_into"],
    "quantize, calibrate": ["brqat.train:quantize", "brqat.train:calibrate"],
    "stability check": ["brqat.train:_check_stability"],
    "dashboard": ["brqat.tracking.wandb:WandbRun.start", "brqat.tracking.files:NoDashboard.start"],
    "first step": ["brqat.fit:Fit._train_epoch"],
    "rest of the run": ["brqat.train:run"],
}


class Clock:
    """Every moment belongs to the innermost phase that is open."""

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.last = began

    def turn(self) -> None:
        now = time.monotonic()
        phase = self.open[-1] if self.open else "Hydra"
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def within(self, phase: str, function):
        def timed(*args, **kwargs):
            self.turn()
            self.open.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self.open.pop()

        return timed

    def watch_imports(self) -> None:
        """Only the outermost import is timed: what a module imports in turn is part of it."""

        def watched(function):
            timed = self.within("imports", function)

            def load(*args, **kwargs):
                return (function if self.open and self.open[-1] == "imports" else timed)(*args, **kwargs)

            return load

        builtins.__import__ = watched(builtins.__import__)
        importlib.import_module = watched(importlib.import_module)

    def watch(self, module: str) -> None:
        for phase, functions in PHASES.items():
            for function in functions:
                where, _, path = function.partition(":")
                if where == module:
                    path, _, group = path.removesuffix(")").partition("(")
                    replace(module, path, lambda old, phase=phase, group=group: self.chosen(phase, old, group))

    def chosen(self, phase: str, function, group: str):
        """With a group, only the calls that name it as their second argument."""
        timed = self.within(phase, function)
        if not group:
            return timed
        return lambda *args, **kwargs: (timed if args[1:2] == (group,) else function)(*args, **kwargs)


def replace(module: str, path: str, change) -> None:
    """Puts change(it) in the place of MODULE.PATH, if there is such a thing."""
    owner = sys.modules[module]
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
    if (old := getattr(owner, name, None)) is not None:
        setattr(owner, name, change(old))


class AfterImport:
    """Calls then(module name) once a module of the given names has been executed, whoever imports it and when."""

    def __init__(self, names: set[str], then):
        self.names, self.then = names, then

    def find_spec(self, name: str, path=None, target=None):
        if name not in self.names:
            return None
        self.names.discard(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(name)

        spec.loader.exec_module = exec_module
        return spec


def main(out: str, mode: str, command: str, arguments: list[str]) -> None:
    started = float(os.environ["BRQAT_STARTED"])
    clock = Clock(BEGAN)
    clock.seconds["python"] = BEGAN - started
    found: dict = {"runs": []}

    def stopping(step):
        def first(fit, *args, **kwargs):
            result = step(fit, *args, **kwargs)
            if not getattr(fit, "sites", True):
                return result  # of a float baseline
            found["first_step"] = time.monotonic() - started
            if mode == "phases":
                clock.turn()
                found["phases"] = dict(clock.seconds)
            write(out, found)
            raise SystemExit(0)

        return first

    def recording(run):
        def recorded(*args, **kwargs):
            began = time.monotonic()
            summary = run(*args, **kwargs)
            found["runs"].append(
                {"began": began - started, "ended": time.monotonic() - started, "trained": summary.get("seconds") or 0}
            )
            return summary

        return recorded

    def patch(module: str) -> None:
        if mode == "runs":
            replace(module, "run", recording)
            return
        if module == "brqat.step":
            replace(module, "Step.__call__", stopping)
        if module == "brqat.fit":
            replace(module, "Fit._step", stopping)  # where older versions have it
        if mode == "phases":
            clock.watch(module)

    wanted = {"step": {"brqat.step", "brqat.fit"}, "runs": {"brqat.train"}}
    modules = {function.partition(":")[0] for functions in PHASES.values() for function in functions} | {"brqat.step"}
    sys.meta_path.insert(0, AfterImport(set(wanted.get(mode, modules)), patch))
    if mode == "phases":
        clock.watch_imports()
    sys.argv = [command.partition(":")[0], *arguments]
    module, _, function = command.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    finally:
        if mode == "runs":
            write(out, found)


def write(out: str, found: dict) -> None:
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, in which brqat's own import would be looked for
    import importlib.util

    main(*sys.argv[1:4], sys.argv[4:])
