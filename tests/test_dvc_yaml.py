"""dvc.yaml declares what the stages read, no less and no more: the code that they import, the params that they use."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from shared.params import Params

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TYPES = {"Params": ""} | {field.annotation.__name__: name for name, field in Params.model_fields.items()}
PARAMS = {
    f"{section}.{name}" for section, field in Params.model_fields.items() for name in field.annotation.model_fields
}


def script_of(stage: str) -> Path:
    return ROOT / re.match(r"python (stages/\w+\.py)", STAGES[stage].get("do", STAGES[stage])["cmd"])[1]


def shared_imports(path: Path) -> set[Path]:
    """The files under stages/shared/ that a script imports, in any form and place, directly or through others."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "shared":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").removeprefix("shared."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("shared.") for alias in node.names}
    files = {file for name in names if (file := ROOT / f"stages/shared/{name}.py").is_file()}
    return files.union(*map(shared_imports, files))


def params_read(path: Path) -> set[str]:
    """The full names of the params that a script and what it imports from shared use."""
    files = {path} | shared_imports(path) - {ROOT / "stages/shared/params.py"}
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    followed = {function.name for function in functions if typed_arguments(function)}
    return {name for function in functions for name in params_used(function, followed)}


def typed_arguments(function: ast.FunctionDef) -> dict[str, str]:
    """Argument → the section of params.yaml that it is by its type; "" is the whole file."""
    types = {argument.arg: ast.unparse(argument.annotation) for argument in function.args.args if argument.annotation}
    return {name: TYPES[type] for name, type in types.items() if type in TYPES}


def params_used(function: ast.FunctionDef, followed: set[str]) -> Iterator[str]:
    """A section that is handed on to a function that is not `followed` counts as used whole."""
    names = typed_arguments(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            section = resolve(node.value, names)
            if section in TYPES.values():
                names[node.targets[0].id] = section
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and resolve(node, names) in PARAMS:
            yield resolve(node, names)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".model_dump"):
            excluded = {
                name for word in node.keywords if word.arg == "exclude" for name in ast.literal_eval(word.value)
            }
            section = resolve(node.func.value, names)
            yield from whole(section) - {f"{section}.{name}" for name in excluded}
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] not in followed:
            for argument in node.args:
                if resolve(argument, names) in TYPES.values():
                    yield from whole(resolve(argument, names))


def resolve(node: ast.expr, names: dict[str, str]) -> str | None:
    """`params.train.epochs` → "train.epochs", where `names` holds that params is "" (all of params.yaml)."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "read_params":
        return ""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and resolve(node.value, names) in TYPES.values():
        return f"{resolve(node.value, names)}.{node.attr}".removeprefix(".")
    return None


def whole(section: str) -> set[str]:
    return {name for name in PARAMS if name.startswith(f"{section}.".removeprefix("."))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_code_that_it_runs(stage):
    declared = {ROOT / dep for dep in STAGES[stage].get("do", STAGES[stage])["deps"] if dep.endswith(".py")}
    assert declared == {script_of(stage)} | shared_imports(script_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_params_that_it_reads(stage):
    declared, each = set(), STAGES[stage].get("foreach", [])
    if isinstance(each, str):  # `${train.seeds}`: each of them makes a stage of its own
        declared.add(re.fullmatch(r"\$\{(.+)\}", each)[1])
        each = []
    for name in STAGES[stage].get("do", STAGES[stage])["params"]:
        for item in each or [""]:
            full = name.replace("${item}", item)
            declared |= {full} & PARAMS or whole(full)
    assert declared == params_read(script_of(stage))


def test_the_readme_shows_the_head_of_the_committed_report():
    report = (ROOT / "metrics/report.md").read_text()
    head = report.removeprefix("# Result").partition("![")[0].strip()
    assert head in (ROOT / "README.md").read_text(), "put the report's head into the README again"
