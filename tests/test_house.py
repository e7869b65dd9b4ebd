"""The rules of the house that a machine can check: what is imported when, what is never written, what is too long."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetrainers.cli import VERBS, build_parser
from finetrainers.config.schema import METHODS, RunConfig

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "finetrainers"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "diffusers", "transformers", "peft"}

PROBE = f"""
import json, sys
from finetrainers.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({HEAVY!r} & set(sys.modules))]))
"""


def run_fresh(arguments: list[str]) -> tuple[int, list[str], str]:
    """Exit code, heavy packages that were imported, and stderr of one command in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy, done.stderr


def test_help_imports_nothing_heavy():
    assert VERBS.keys() >= {"train", "precompute", "plan", "bench", "sample", "models", "demo", "doctor", "report"}
    commands = [["--help"], *([verb, "--help"] for verb in VERBS)]
    with ThreadPoolExecutor(4) as pool:
        for command, (code, heavy, _) in zip(commands, pool.map(run_fresh, commands), strict=True):
            assert (code, heavy) == (0, []), command


def test_config_error_imports_nothing_heavy(tmp_path):
    config = tmp_path / "broken.yaml"
    config.write_text("model: {path: x}\ndata: {train: y}\noutput: z\ntraining: {stepz: 1}\n")
    commands = [[verb, str(config)] for verb in ("train", "precompute", "plan", "bench")]
    commands.append(["train", str(tmp_path / "absent.yaml")])
    with ThreadPoolExecutor(4) as pool:
        for command, (code, heavy, stderr) in zip(commands, pool.map(run_fresh, commands), strict=True):
            assert (code, heavy) == (2, []), command
            assert len(stderr.splitlines()) == 1, stderr
            assert command[1] in stderr


def test_help_is_quick():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "finetrainers", "--help"], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    # The goal is 0.3 s; this only tells when something heavy has crept in.
    assert min(seconds) < 1.0, seconds


def name_of(node: ast.AST) -> str:
    """`a.b.c` for a name or a chain of attributes, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := name_of(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def root_of(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """Each absolute import anywhere in a module: its node, the name that it binds, and what it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node, alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_names(tree: ast.AST) -> dict[str, str]:
    """What the imported names of a module stand for: `nn` for `torch.nn`, `load` for `torch.load`."""
    bound = {}
    for _, name, target in imports_of(tree):
        bound[name] = target if name != target.split(".")[0] else name
    return bound


def called(node: ast.Call, bound: dict[str, str]) -> str:
    """The full name of what is called, through the module's imports."""
    head, dot, tail = name_of(node.func).partition(".")
    return bound.get(head, head) + dot + tail


UNSAFE_MODULES = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "requests", "urllib", "urllib3", "ftplib"
}  # fmt: skip
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def unsafe_imports(tree: ast.AST) -> Iterator[ast.AST]:
    for node, _, target in imports_of(tree):
        if target.split(".")[0] in UNSAFE_MODULES:
            yield node


def unsafe_calls(tree: ast.AST) -> Iterator[ast.AST]:
    bound = full_names(tree)
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(name_of(base) in safe_loaders for base in node.bases):
            safe_loaders.add(node.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        literals = {key: value.value for key, value in keywords.items() if isinstance(value, ast.Constant)}
        name = called(node, bound)
        loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if (
            name in UNSAFE_CALLS
            or (name == "torch.load" and literals.get("weights_only") is not True)
            or (name == "yaml.load" and (loader is None or name_of(loader) not in safe_loaders))
            or ("trust_remote_code" in keywords and literals.get("trust_remote_code") is not False)
            or ("shell" in keywords and literals.get("shell") is not False)
            or literals.get("allow_pickle")
        ):
            yield node


def assignments_into_libraries(tree: ast.AST) -> Iterator[ast.AST]:
    """Anything set on a module or class of the heavy packages: `torch.x = y`, `setattr(LTXPipeline, ...)`."""
    theirs = {name for _, name, target in imports_of(tree) if target.split(".")[0] in HEAVY}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and name_of(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "")]
        else:
            continue
        flat = [inner for target in targets for inner in (getattr(target, "elts", None) or [target])]
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) and root_of(target) in theirs for target in flat):
            yield node


def swallowed_exceptions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or name_of(kind) in ("Exception", "BaseException") for kind in kinds)
            if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                yield node
        elif (
            isinstance(node, ast.Call)
            and name_of(node.func).endswith("suppress")
            and any(name_of(kind) in ("Exception", "BaseException") for kind in node.args)
        ):
            yield node


Rule = Callable[[ast.AST], Iterator[ast.AST]]
RULES: dict[str, tuple[Rule, list[str], list[str]]] = {
    "no unsafe import": (
        unsafe_imports,
        ["import pickle", "from pickle import loads", "import urllib.request", "def f():\n    import requests as r"],
        ["import json", "from finetrainers.errors import UserError"],
    ),
    "no unsafe call": (
        unsafe_calls,
        [
            "import torch\ntorch.load(path)",
            "import torch\ntorch.load(path, weights_only=False)",
            "import torch\ntorch.load(path, weights_only=flag)",
            "from torch import load as read\nread(path)",
            "import yaml\nyaml.load(text)",
            "import yaml\nyaml.load(text, Loader=yaml.Loader)",
            "import yaml\nyaml.load(text, yaml.FullLoader)",
            "import yaml\nclass Mine(yaml.Loader): pass\nyaml.load(text, Loader=Mine)",
            "from yaml import unsafe_load\nunsafe_load(text)",
            "eval('1')",
            "exec(code)",
            "compile(code, 'x', 'exec')",
            "Model.from_pretrained(path, trust_remote_code=True)",
            "subprocess.run(command, shell=True)",
            "import os\nos.system('ls')",
            "numpy.load(path, allow_pickle=True)",
        ],
        [
            "import torch\ntorch.load(path, weights_only=True)",
            "import torch\ntorch.compile(model)",
            "import re\nre.compile('x')",
            "model.eval()",
            "import yaml\nclass Mine(yaml.SafeLoader): pass\nyaml.load(text, Loader=Mine)",
            "import yaml\nyaml.safe_load(text)",
            "subprocess.run(command)",
        ],
    ),
    "nothing is assigned into a library": (
        assignments_into_libraries,
        [
            "import torch\ntorch.load = mine",
            "import torch.nn.functional as F\nF.silu = mine",
            "from diffusers import LTXPipeline\nLTXPipeline.encode_prompt = mine",
            "from diffusers import LTXPipeline\nsetattr(LTXPipeline, 'x', mine)",
            "def f():\n    import peft\n    peft.TABLE['x'], y = mine, 1",
            "import torch\ntorch.backends.cudnn.benchmark = True",
            "import torch\ntorch.x += 1",
            "import torch\ndel torch.x",
        ],
        ["import torch\nx = torch.load", "import torch\nself.x = torch.nn.Linear(1, 1)", "model.torch = 1"],
    ),
    "no broad except goes on": (
        swallowed_exceptions,
        [
            "try:\n    f()\nexcept Exception:\n    pass",
            "try:\n    f()\nexcept:\n    x = 1",
            "try:\n    f()\nexcept (ValueError, BaseException) as error:\n    log(error)",
            "with contextlib.suppress(Exception):\n    f()",
        ],
        [
            "try:\n    f()\nexcept ValueError:\n    pass",
            "try:\n    f()\nexcept BaseException:\n    undo()\n    raise",
            "try:\n    f()\nexcept Exception as error:\n    raise UserError('x') from error",
        ],
    ),
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    find, bad, good = RULES[rule]
    assert [text for text in bad if not list(find(ast.parse(text)))] == [], "the rule lets these pass"
    assert [text for text in good if list(find(ast.parse(text)))] == [], "the rule refuses these"
    assert [place(path, node) for path in SOURCES for node in find(parse(path))] == []


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(argument is not None and argument.arg not in ("self", "cls") for argument in named)


# `file:function` of signatures that are long for a written reason.
LONG_SIGNATURES: dict[str, str] = {}


def test_files_stay_short():
    limits = [(SOURCES, 350), (sorted((ROOT / "tests").rglob("*.py")), 500)]
    lengths = {path: (len(path.read_text().splitlines()), limit) for paths, limit in limits for path in paths}
    assert [f"{place(path, ast.Pass())} {n}" for path, (n, limit) in lengths.items() if n >= limit] == []


def test_functions_stay_short():
    found = [(path, node, (node.end_lineno or 0) - node.lineno + 1) for path in SOURCES for node in functions_of(path)]
    assert [f"{place(path, node)} {node.name} has {length}" for path, node, length in found if length >= 60] == []


def test_signatures_stay_short():
    found = {
        f"{path.relative_to(ROOT)}:{node.name}": num_parameters(node) for path in SOURCES for node in functions_of(path)
    }
    assert {name: count for name, count in found.items() if count >= 8 and name not in LONG_SIGNATURES} == {}
    assert LONG_SIGNATURES.keys() <= found.keys()


def test_every_module_says_what_it_is_for():
    assert [place(path, ast.Pass()) for path in SOURCES if not ast.get_docstring(parse(path))] == []


def test_every_module_stands_on_a_floor():
    tomllib = pytest.importorskip("tomllib")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = {room.strip() for floor in contracts[0]["layers"] for room in floor.split("|")}
    homeless = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        above = {".".join(parts[:depth]) for depth in range(2, len(parts) + 1)}
        if module not in ("finetrainers", "finetrainers.__main__") and not above & rooms:
            homeless.append(module)
    assert homeless == []


def test_the_tree_of_the_architecture_page_is_the_package():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown, folders = set(), {}
    for indent, name in re.findall(r"^( *)([\w.]+(?:\.py|/))", page.split("```")[1], flags=re.MULTILINE):
        folders[len(indent)] = name
        if name.endswith(".py"):
            shown.add("".join(folders[depth] for depth in sorted(folders) if depth < len(indent)) + name)
    assert shown == {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}


RELIED_ON = {
    "model.path", "model.task", "data.train", "data.buckets", "data.caption_dropout", "data.num_workers",
    "method.name", "method.rank", "method.alpha", "optimizer.name", "optimizer.lr", "training.steps",
    "training.batch_size", "training.gradient_accumulation_steps", "training.seed", "training.precision",
    "training.max_grad_norm", "training.gradient_checkpointing", "parallel.strategy", "checkpoint.every",
    "checkpoint.keep", "validation.every", "output",
}  # fmt: skip


def test_keys_that_others_rely_on_are_there():
    keys = set(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        kinds = METHODS.values() if name == "method" else [field.annotation]
        keys |= {f"{name}.{key}" for kind in kinds for key in getattr(kind, "model_fields", {})}
    assert keys >= RELIED_ON


def committed_texts() -> dict[str, str]:
    """Every text file that git tracks or would."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        # A tracked file may have been deleted and not yet committed; a binary file has no text.
        if name and path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts[name] = data.decode(errors="replace")
    return texts


def test_no_text_names_a_machine():
    # Built from parts, so that this file does not name them either.
    names = [f"/{folder}/" for folder in ("work", "root", "opt")] + ["farm" + "-bench", "shared/" + "hooks"]
    assert [(file, name) for file, text in committed_texts().items() for name in names if name in text] == []


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def shown_commands(page: str) -> list[list[str]]:
    """The arguments of each finetrainers command in a page's bash blocks."""
    commands = []
    for block in re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [at + 1 for at, word in enumerate(words) if word == "finetrainers"]
            if starts and (starts[0] == 1 or words[starts[0] - 2] == "-m"):
                commands.append(words[starts[0] :])
    return commands


def test_shown_commands_are_found():
    page = """
```bash
finetrainers train a.yaml \\
  training.steps=5  # short
pip install finetrainers
HF_HUB_OFFLINE=1 torchrun -m finetrainers demo
```
```yaml
finetrainers: x
```
"""
    assert shown_commands(page) == [["train", "a.yaml", "training.steps=5"], ["demo"]]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_shown_commands_parse(page, capsys):
    for command in shown_commands(page.read_text(encoding="utf-8")):
        try:
            build_parser().parse_args(command)
        except SystemExit as stop:
            assert stop.code == 0, f"finetrainers {shlex.join(command)}: {capsys.readouterr().err}"
